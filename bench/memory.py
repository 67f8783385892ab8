"""Memory planned against memory measured, cell by cell: `halfbyte fill` in a process of its own for
every context, kind of cache and number of sequences.

    python bench/memory.py MODEL [MODEL ...]

Each cell is one row: planned and measured bytes, and the error; the bound is 3 % or 32 MiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from halfbyte.formats.reference import drafter_beside

CONTEXTS = ("2k", "8k", "32k")
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--contexts", nargs="+", default=CONTEXTS)
    parser.add_argument("--kv", nargs="+", default=["bf16", "q8_0"])
    parser.add_argument("--sequences", nargs="+", default=["1", "4"])
    parser.add_argument("--drafts", nargs="+", default=["off", "auto"])
    parser.add_argument("--recipe", help="of models that are not quantized")
    arguments = parser.parse_args()
    print(
        "| model | context | cache | sequences | drafter | planned, MiB | measured, MiB | error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    cells = product(
        arguments.models,
        arguments.contexts,
        arguments.kv,
        arguments.sequences,
        arguments.drafts,
        [arguments.recipe],
    )
    broken = [cell for cell in cells if not holds(*cell)]
    if broken:
        sys.exit(f"{len(broken)} cells are beyond the bound")


def holds(
    model: Path, context: str, kv: str, sequences: str, draft: str, recipe: str | None
) -> bool:
    """Prints a cell; is it within the bound, or nothing that the model has?"""
    if draft != "off" and drafter_beside(model) is None:
        return True
    command = [sys.executable, "-m", "halfbyte", "fill", str(model), "--json", "--no-calibration"]
    command += ["--context", context, "--kv", kv, "--sequences", sequences, "--draft", draft]
    command += [] if recipe is None else ["--recipe", recipe]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        print(f"{model.name} {context}: {done.stderr.splitlines()[0]}", file=sys.stderr)
        return done.returncode in (1, 2, 3)
    filled: dict[str, Any] = json.loads(done.stdout)
    total = filled["rows"][-1]
    planned, measured = total["planned_bytes"] / MIB, total["measured_bytes"] / MIB
    drafter = "" if draft == "off" else "yes"
    print(
        f"| {model.stem} | {context} | {kv} | {sequences} | {drafter} | {planned:.1f}"
        f" | {measured:.1f}"
        f" | {(measured - planned) / planned:+.1%} |",
        flush=True,
    )
    return bool(filled["holds"])


if __name__ == "__main__":
    main()
