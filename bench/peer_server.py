"""Rounds of drafts in llama.cpp: its server is asked for tokens, and tells how long they took.

Only the server has the speculative loop with synthetic acceptance (bench/build_peer.py builds it).
The seconds are its own, of generating: without the prompt and without anything of HTTP. It does not
start on a model without a vocabulary: make it by bench/random_model.py --vocabulary.
"""

from __future__ import annotations

import json
import socket
import subprocess
from argparse import Namespace
from collections.abc import Generator
from contextlib import contextmanager
from tempfile import TemporaryFile
from time import sleep
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from build_peer import server

STARTING_S = 300
ANSWERING_S = 3600


def rounds_of_drafts(arguments: Namespace, flash: str, ubatch: str) -> dict[str, float]:
    """The row `speculate@DEPTH`: tokens per second at the rates, by the mean seconds of a round.

    As on our side it is one and the sum of the rates for each round, whatever its luck was.
    """
    rates = [float(rate) for rate in arguments.synthetic_rates.split(",")]
    expected = 1 + sum(rates)
    wanted = int(arguments.decode * expected)
    prompt = [i * 7919 % 1000 for i in range(max(arguments.depth, 1))]
    command = [server(), "-m", arguments.model, "-md", arguments.drafter]
    command += ["--spec-type", "draft-mtp", "--spec-draft-n-max", len(rates)]
    command += ["--spec-synth-rates", arguments.synthetic_rates, "-fa", flash, "-ub", ubatch]
    command += ["-t", arguments.threads, "-td", arguments.threads]
    command += ["-c", len(prompt) + wanted + len(rates) + 1, "-np", 1]
    with running([*map(str, command)]) as address:
        answer(address, prompt, wanted)  # warms up
        seconds = [round_s(answer(address, prompt, wanted)) for _ in range(arguments.repeats)]
    return {f"speculate@{arguments.depth}": expected * len(seconds) / sum(seconds)}


@contextmanager
def running(command: list[str]) -> Generator[str]:
    """The server's address while it runs, when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        try:
            if not ready(process, address):
                log.seek(0)
                raise RuntimeError(f"llama-server: {log.read().decode()[-2000:]}")
            yield address
        finally:
            process.terminate()
            process.wait()


def ready(process: subprocess.Popen[bytes], address: str) -> bool:
    """Waits until the model is loaded; False if the server ends, or never gets there."""
    for _ in range(10 * STARTING_S):
        if process.poll() is not None:
            return False
        try:
            with urlopen(f"{address}/health", timeout=ANSWERING_S):
                return True
        except URLError:
            sleep(0.1)
    return False


def answer(address: str, prompt: list[int], count: int) -> dict[str, Any]:
    """What the server says of a completion's time."""
    asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False}
    request = Request(f"{address}/completion", json.dumps(asked).encode())
    with urlopen(request, timeout=ANSWERING_S) as reply:
        return json.load(reply)["timings"]


def round_s(timings: dict[str, Any]) -> float:
    """Every round gives the drafts that were accepted and one token more."""
    rounds = timings["predicted_n"] - timings["draft_n_accepted"]
    return timings["predicted_ms"] / 1000 / rounds
