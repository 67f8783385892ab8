"""Several streams at once, from our server and from llama.cpp's: the same file, slots and threads.

    python bench/serving.py MODEL [MODEL...] [--streams 1,4,16] [--prompt 128] [--tokens 64]

Each stream asks for a text of its own (ids, so that both read the same), greedily, to the full
length, one request after the other; tokens per second are those of all streams together, the time
to the first token is the client's. Our server and the other one take turns, so that a machine that
drifts does so for both. It talks to servers of its own on this machine only, and ends by itself.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from urllib.parse import urlsplit

from build_peer import server
from peer_server import running

from halfbyte.formats.reference import DEMO, demo_path

ROUNDS = 3


@dataclass(frozen=True)
class Sample:
    """One request: seconds to the first piece, tokens, and when it ended."""

    first_s: float
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--streams", default="1,4,16")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2, help="of each stream, in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1000, help="ids of prompts are below")
    parser.add_argument("--peer", help="llama-server, if not the one of bench/build_peer.py")
    parser.add_argument("--only", choices=("halfbyte", "llama.cpp"))
    arguments = parser.parse_args()
    print("| model | streams | server | tokens/s | first token, p50 ms | p99 ms |")
    print("|---|---|---|---|---|---|")
    for model in arguments.models:
        for streams in map(int, arguments.streams.split(",")):
            rows = measured(model, streams, arguments)
            for name, (rate, firsts) in rows.items():
                p50, p99 = percentile(firsts, 50), percentile(firsts, 99)
                print(
                    f"| {model} | {streams} | {name} | {rate:.1f} | {p50:.0f} | {p99:.0f} |",
                    flush=True,
                )


def measured(
    model: str, streams: int, arguments: argparse.Namespace
) -> dict[str, tuple[float, list[float]]]:
    """The median rate of the rounds and all first tokens in ms, by server."""
    context = 64 * -(-(arguments.prompt + arguments.tokens + 8) // 64)
    ours = [sys.executable, "-m", "halfbyte", "serve", model, "--parallel", streams, "--no-page"]
    ours += ["--threads", arguments.threads, "--context", context, "--draft", "off"]
    theirs = [arguments.peer or server(), "-m", file_of(model), "-np", streams, "--no-webui"]
    theirs += ["-c", streams * context, "-fa", "auto"]
    theirs += ["-t", arguments.threads, "-tb", arguments.threads]
    commands = {"halfbyte": ours, "llama.cpp": theirs}
    found: dict[str, tuple[list[float], list[float]]] = {}
    for name, command in commands.items():
        if arguments.only not in (None, name):
            continue
        rates, firsts = found.setdefault(name, ([], []))
        with running([*map(str, command)]) as address:
            one_round(address, streams, arguments, seed=0)  # warms up
            for number in range(ROUNDS):
                rate, samples = one_round(address, streams, arguments, seed=1 + number)
                rates.append(rate)
                firsts += [1e3 * it.first_s for it in samples]
    return {name: (statistics.median(rates), firsts) for name, (rates, firsts) in found.items()}


def file_of(model: str) -> str:
    """What the other server can open."""
    return str(demo_path()) if model == DEMO else model


def one_round(
    address: str, streams: int, arguments: argparse.Namespace, seed: int
) -> tuple[float, list[Sample]]:
    """Tokens per second of all streams together, and every request."""

    def stream(number: int) -> list[Sample]:
        return [
            request(address, arguments, seed=1000 * seed + 10 * number + turn)
            for turn in range(arguments.requests)
        ]

    start = perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        samples = [it for found in pool.map(stream, range(streams)) for it in found]
    return sum(it.tokens for it in samples) / (perf_counter() - start), samples


def request(address: str, arguments: argparse.Namespace, seed: int) -> Sample:
    """One stream from its beginning to its end."""
    prompt = [
        4 + (i * 7919 + seed * 104729 + i * i * seed) % (arguments.vocabulary - 4)
        for i in range(arguments.prompt)
    ]
    body = {
        "prompt": prompt,
        "max_tokens": arguments.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, tokens = perf_counter(), 0.0, 0
    for data in frames(address, "/v1/completions", body):
        first = first or perf_counter() - start
        tokens = (data.get("usage") or {}).get("completion_tokens", tokens)
    return Sample(first, tokens)


def frames(address: str, path: str, body: object) -> Generator[dict[str, object]]:
    """The data of every event of a stream."""
    with connected(address) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(answer.read().decode())
        for line in answer:
            data = line.removeprefix(b"data: ").strip()
            if line.startswith(b"data: ") and data != b"[DONE]":
                yield json.loads(data)


@contextmanager
def connected(address: str) -> Generator[http.client.HTTPConnection]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
    try:
        yield connection
    finally:
        connection.close()


def percentile(values: list[float], percent: float) -> float:
    """By the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


if __name__ == "__main__":
    try:
        main()
    except subprocess.SubprocessError as error:
        sys.exit(str(error))
