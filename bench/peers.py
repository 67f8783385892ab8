"""The same GGUF in halfbyte and in llama.cpp, in turn, in one run: A B B A, medians and ratios.

    pip install -e '.[peers]'
    python bench/peers.py model.gguf --rounds 3
    python bench/peers.py 12b.gguf --rows prefill@128,decode@0,rows@8 --decode 8 --flash on

Each round starts a process of its own for each side (bench/peer_side.py), on a file that is in the
page cache; every other round begins with llama.cpp, since who comes second finds memory that was
just freed. Both run the trials of `halfbyte bench` on fixed tokens and sample nothing. llama.cpp
maps the file, repacks weights as it does by default, has a cache of f16 as by default, and sliding
windows no longer than they need be, as in its own programs. It runs with every setting of --flash
(attention in one op or in several) and --ubatch (rows of a prompt at once); in each row its best
setting counts, and is named.

Seconds to the first token are told twice: of the whole process, which imports Python packages, and
from the start of loading. Memory is that above the imports. The share of the read bandwidth is of
the stored bytes that a token needs, on either side. With --drafter, rounds of drafts behind --depth
tokens are timed at --synthetic-rates, in llama.cpp by its server (bench/build_peer.py builds it).

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from peer_server import rounds_of_drafts

from halfbyte.evals.bench import standard, trial_of
from halfbyte.formats.checkpoint import read

SIDE = Path(__file__).with_name("peer_side.py")
WARM_BYTES = 1 << 24
Facts = dict[str, float]


class Setting(NamedTuple):
    """How llama.cpp runs."""

    flash: str
    ubatch: str

    def __str__(self) -> str:
        return f"flash {self.flash}, ubatch {self.ubatch}"


def main() -> None:
    arguments = parsed()
    settings = [Setting(*pair) for pair in product(arguments.flash, arguments.ubatch)]
    ours: list[Facts] = []
    theirs: dict[Setting, list[Facts]] = {setting: [] for setting in settings}
    for number in range(arguments.rounds):
        sides: list[Setting | None] = [None, *settings]
        for setting in sides if number % 2 == 0 else reversed(sides):
            if setting is None:
                ours.append(measured("halfbyte", arguments))
                continue
            theirs[setting].append(measured("llama.cpp", arguments, setting))
            if arguments.drafter is not None:
                theirs[setting][-1] |= rounds_of_drafts(arguments, *setting)
    with_shares(ours, theirs)
    rows = compared(ours, theirs)
    show(rows)
    facts = {"model": arguments.model.name, "threads": arguments.threads}
    print(json.dumps({"schema": "halfbyte.peers/1", **facts, "rounds": len(ours), "rows": rows}))


def parsed() -> argparse.Namespace:
    def several(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=several, help="prefill@512,decode@0,rows@8; else the usual")
    parser.add_argument("--decode", type=int, default=32, help="tokens, or rounds of drafts")
    parser.add_argument("--repeats", type=int, default=1, help="of a prompt, in each round")
    parser.add_argument("--flash", type=several, default=["on", "off"], help="on,off")
    parser.add_argument("--ubatch", type=several, default=["512"], help="512,1024")
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--synthetic-rates", default="0.8,0.64,0.51,0.41")
    parser.add_argument("--depth", type=int, default=0, help="of rounds of drafts")
    arguments = parser.parse_args()
    if arguments.rows is None:
        context = read(arguments.model).spec.context
        arguments.rows = [trial.name for trial in standard(context, decode=arguments.decode)]
    return arguments


def measured(side: str, arguments: argparse.Namespace, setting: Setting | None = None) -> Facts:
    """Runs one side in a process of its own."""
    rows = arguments.rows
    if any(row.startswith("rows@") for row in rows):
        rows = [*dict.fromkeys((*rows, "rows@1"))]
    command: list[Any] = [sys.executable, SIDE, side, arguments.model, "--rows", ",".join(rows)]
    context = max(trial_of(row).length(arguments.decode) for row in rows)
    command += ["--context", context, "--threads", arguments.threads]
    command += ["--decode", arguments.decode, "--repeats", arguments.repeats]
    if setting is not None:
        command += ["--flash", setting.flash, "--ubatch", setting.ubatch]
    elif arguments.drafter is not None:
        command += ["--drafter", arguments.drafter, "--depth", arguments.depth]
        command += ["--synthetic-rates", arguments.synthetic_rates]
    warm(arguments.model)
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    start = perf_counter()
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = perf_counter() - start
        last = process.stdout.read()
    if process.returncode:
        sys.exit(f"{side} failed on {arguments.model}")
    return {"start_to_first_token_s": first, **json.loads(last)}


def warm(path: Path) -> None:
    """Puts a file into the page cache."""
    with path.open("rb") as file:
        while file.read(WARM_BYTES):
            pass


def with_shares(ours: list[Facts], theirs: dict[Setting, list[Facts]]) -> None:
    """Adds each side's share of the bandwidth that was measured in the round."""
    for index, facts in enumerate(ours):
        needed, bandwidth = facts.pop("step_bytes"), facts.pop("read_bandwidth_bytes_per_s")
        for side in (facts, *(found[index] for found in theirs.values())):
            if "decode@0" in side:
                side["bandwidth_share@0"] = needed * side["decode@0"] / bandwidth


def compared(ours: list[Facts], theirs: dict[Setting, list[Facts]]) -> dict[str, dict[str, Any]]:
    """For every row both medians, llama.cpp's of its best setting, and the median of the ratios."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ours[0]:
        best = (max if more_is_better(name) else min)(
            theirs, key=lambda setting: median(facts[name] for facts in theirs[setting])
        )
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs[best], strict=True)]
        rows[name] = {
            "halfbyte": median(a for a, _ in pairs),
            "llama.cpp": median(b for _, b in pairs),
            "ratio": median(a / b for a, b in pairs),
            "setting": str(best),
        }
    return rows


def more_is_better(name: str) -> bool:
    """Tokens per second and shares; the rest are seconds, bytes, and times of one row."""
    return "@" in name and "/" not in name


def show(rows: dict[str, dict[str, Any]]) -> None:
    print(f"{'':24}{'halfbyte':>12}{'llama.cpp':>12}{'ratio':>8}")
    for name, row in rows.items():
        figures = f"{row['halfbyte']:12.5g}{row['llama.cpp']:12.5g}{row['ratio']:8.2f}"
        print(f"{name:24}{figures}  {row['setting']}")


if __name__ == "__main__":
    main()
