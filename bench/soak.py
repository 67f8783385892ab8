"""Half an hour of everything at once: whether a server grows, loses pages, or gets stuck.

    python bench/soak.py [MODEL] [--minutes 30] [--clients 8] [--pause 0]

Clients with different habits (chats that go on, titles, schemas, several choices, Anthropic's and
the Responses API, nonsense) talk to a server of ours on this machine; a third of them leave at a
random moment, and each rests for `--pause` seconds on average before it asks again. It fails if
memory grew by more than 2 % from the end of the first fifth to the end, if at the end anything is
held that is not merely kept, or if any answer was a 5xx.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from urllib.parse import urlsplit
from urllib.request import urlopen

from peer_server import running

PATIENCE_S = 3600
WORDS = (
    "the",
    "sea",
    "is",
    "deep",
    "and",
    "old",
    "ships",
    "sail",
    "on",
    "it",
    "when",
    "wind",
    "comes",
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0, help="seconds of rest")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "halfbyte", "serve", arguments.model, "--parallel", "4"]
    command += ["--threads", str(arguments.threads), "--queue", "16"]
    with running(command) as address:
        report = soak(address, arguments)
    print(json.dumps(report, indent=2))
    sys.exit(0 if report["passed"] else 1)


def soak(address: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Runs it and says what came of it."""
    end = monotonic() + 60 * arguments.minutes
    statuses: Counter[int] = Counter()
    sizes: list[tuple[float, float]] = []
    start = monotonic()
    with ThreadPoolExecutor(arguments.clients + 1) as pool:
        clients = [
            pool.submit(client, address, seed, end, arguments.pause, statuses)
            for seed in range(arguments.clients)
        ]
        while monotonic() < end:
            sizes.append((monotonic() - start, metric(address, 'memory_bytes{kind="resident"}')))
            sleep(1.0)
        for it in clients:
            it.result()
    sleep(2.0)
    settled = [size for at, size in sizes if at > 12 * arguments.minutes]
    tail = settled[-max(1, len(settled) // 10) :]
    growth = sum(tail) / len(tail) / settled[0] - 1
    left = {
        name: metric(address, name)
        for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
    }
    failed = sum(count for status, count in statuses.items() if status >= 500)
    return {
        "minutes": arguments.minutes,
        "answers": dict(sorted(statuses.items())),
        "resident_bytes": {"settled": settled[0], "end": sizes[-1][1], "peak": max(sizes)[1]},
        "growth": growth,
        "left": left,
        "passed": growth <= 0.02 and not any(left.values()) and not failed,
    }


def client(address: str, seed: int, end: float, pause: float, statuses: Counter[int]) -> None:
    """One client, with habits by chance. The status 0 is: it left."""
    chance = random.Random(seed)
    talk: list[dict[str, str]] = []
    while monotonic() < end:
        path, body, talk = habit(chance, talk)
        leaves = chance.random() < 0.33
        statuses[ask(address, path, body, chance.uniform(0, 0.5) if leaves else None)] += 1
        sleep(chance.uniform(0, 2 * pause))


def habit(
    chance: random.Random, talk: list[dict[str, str]]
) -> tuple[str, dict[str, object], list[dict[str, str]]]:
    """What to ask next, and the conversation so far."""
    text = " ".join(chance.choices(WORDS, k=chance.choice((3, 12, 60, 300))))
    question = [{"role": "user", "content": text}]
    shared = {"stream": chance.random() < 0.6, "max_tokens": chance.choice((1, 20, 120))}
    chat = "/v1/chat/completions"
    match chance.randrange(9):
        case 0 | 1 | 2:
            talk = [*talk, *question] if len(talk) < 12 else question
            said = {"role": "assistant", "content": " ".join(chance.choices(WORDS, k=9))}
            return chat, {"messages": talk, **shared}, [*talk, said]
        case 3:
            return chat, {"messages": question, "max_tokens": 8}, talk
        case 4:
            structure = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
            return chat, {"messages": question, "response_format": structure, **shared}, talk
        case 5:
            more = {"n": 3, "logprobs": True, "top_logprobs": 5, "stop": ["sea", "\n"]}
            return chat, {"messages": question, **more, **shared}, talk
        case 6:
            return "/v1/messages", {"messages": question, **shared}, talk
        case 7:
            body = {"input": text, "stream": shared["stream"], "max_output_tokens": 20}
            return "/v1/responses", body, talk
        case _:
            nonsense = chance.choice(({"messages": []}, {"messages": question, "n": 99}, {}))
            return chat, nonsense, talk


def ask(address: str, path: str, body: object, leaves_after: float | None) -> int:
    """The status of the answer, all of which is read; 0 if the client left before that."""
    data = json.dumps(body).encode()
    parts = urlsplit(address)
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    place = (parts.hostname or "", parts.port or 0)
    with socket.create_connection(place, timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + data)
        if leaves_after is not None:
            sleep(leaves_after)
            return 0
        answer = connection.recv(65536)
        while connection.recv(65536):
            pass
    return int(answer.split()[1])


def metric(address: str, name: str) -> float:
    with urlopen(f"{address}/metrics", timeout=PATIENCE_S) as reply:
        text = reply.read().decode()
    found = re.search(rf"^halfbyte_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


if __name__ == "__main__":
    main()
