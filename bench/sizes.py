"""Weights of published models beside what their makers list, and what makes the difference.

    python bench/sizes.py

GB of 10^9 bytes. Ours are sums over the tensors of the text model. `all` is the makers' count of
parameters, with the parts for images and sound; the listed figures are Google's (the announcement
of Gemma 3's QAT checkpoints, April 2025; ai.google.dev/gemma/docs/core for Gemma 4).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from halfbyte.families import spec_of
from halfbyte.planner.solve import schemes_of
from halfbyte.specs import ModelSpec

CONFIGS = Path(__file__).parent / "configs"
# name: (billions of parameters in all, listed bf16, listed 4 bit)
LISTED = {
    "gemma3-1b": (1.00, 2.0, 0.5),
    "gemma3-4b": (4.30, 8.0, 2.6),
    "gemma3-12b": (12.19, 24.0, 6.6),
    "gemma3-27b": (27.43, 54.0, 14.1),
    "gemma4-e2b": (5.1, 11.4, 2.9),
    "gemma4-e4b": (8.0, 17.9, 4.5),
    "gemma4-12b": (11.95, 26.7, 6.7),
    "gemma4-26b-a4b": (25.2, 57.7, 14.4),
    "gemma4-31b": (30.7, 69.9, 17.5),
}
GB = 1e9


def main() -> None:
    print("| model | text, bf16 | all, bf16 | listed | over all |", end="")
    print(" text, q4_0 | = 4 bits | + scales | + wider table | + rest | listed | bits of all |")
    print("|---|" + "---|" * 11)
    for name in LISTED:
        print("| " + " | ".join(cells(name)) + " |")


def cells(name: str) -> Iterator[str]:
    everything, bf16, four = LISTED[name]
    spec = spec_of(json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))
    yield name
    yield f"{2 * spec.parameters / GB:.2f}"
    yield f"{2 * everything:.2f}"
    yield f"{bf16:g}"
    yield f"{bf16 / (2 * everything) - 1:+.0%}"
    parts = parts_of(spec)
    yield f"{sum(parts) / GB:.2f}"
    yield from (f"{part / GB:.2f}" for part in parts)
    yield f"{four:g}"
    yield f"{8 * four / everything:.2f}"


def parts_of(spec: ModelSpec) -> tuple[float, float, float, float]:
    """Bytes of q4_0: half a byte for every weight, scales of blocks, what a table of embeddings has
    beyond four bits and a scale, and what is kept wider besides."""
    schemes = schemes_of(spec, "q4_0")
    half, scales, table, rest = 0.0, 0.0, 0.0, 0.0
    for tensor in spec.tensors():
        size = schemes[tensor.name].bytes(tensor.shape)
        half += tensor.count / 2
        if tensor.name in ("embed.weight", "head.weight"):
            scales += tensor.count / 16
            table += size - tensor.count * 9 / 16
        elif schemes[tensor.name].name == "q4_0":
            scales += size - tensor.count / 2
        else:
            rest += size - tensor.count / 2
    return half, scales, table, rest


if __name__ == "__main__":
    main()
