"""`halfbyte serve` as a process of its own: what it is told, where it listens, how it ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from urllib.request import Request, urlopen

from commandline import Halfbyte
from served import WAIT_S, commanded


def get(url: str) -> dict:
    with urlopen(url, timeout=WAIT_S) as reply:
        return json.load(reply)


def test_a_plan_is_served_and_the_first_signal_lets_finish(halfbyte: Halfbyte, tmp_path: Path):
    file = tmp_path / "plan.json"
    flags = ("--context", 512, "--kv", "q8_0", "--sequences", 3)
    assert halfbyte("plan", "demo", *flags, "--emit", file).code == 0
    with commanded("--plan", file, "--threads", 1) as command:
        url = command.url
        info = get(f"{url}/api/info")
        plan = json.loads(file.read_text())
        assert (info["context"], info["parallel"]) == (512, 3)
        assert info["plan"]["setup"] == plan["setup"]
        parts = sum(row["bytes"] for row in plan["rows"] if row["component"].startswith("kv."))
        assert info["measured"]["kv"] == parts
        assert "3 at once, 512 tokens each" in "".join(command.said)
        body = {"prompt": "The sea", "max_tokens": 300, "ignore_eos": True, "stream": True}
        asked = Request(f"{url}/v1/completions", json.dumps(body).encode())
        with urlopen(asked, timeout=WAIT_S) as reply:
            first = reply.readline()
            command.process.send_signal(signal.SIGTERM)
            rest = reply.read()
        assert first.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        assert command.process.wait(WAIT_S) == 0


def test_what_a_plan_says_no_flag_may(halfbyte: Halfbyte, tmp_path: Path):
    file = tmp_path / "plan.json"
    assert halfbyte("plan", "demo", "--emit", file).code == 0
    for flag, value in (("--parallel", 2), ("--context", 64), ("--draft", "off")):
        told = halfbyte("serve", "demo", "--plan", file, flag, value)
        assert told.code == 2 and f"{flag} is said by the plan" in told.err
