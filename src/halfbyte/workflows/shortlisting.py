"""Which tokens a drafter's head needs: those that its target really says.

The head is most of what a small drafter reads in a step. Of a large vocabulary a model says a small
part, so a head of the tokens it says most covers nearly all; what is left out is never drafted, and
costs a round where it comes. The coverage is measured on what the target says itself, half of which
chose the tokens and half of which is only counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import IntegrityError, InvalidInputError
from halfbyte.formats.atomic import write_file
from halfbyte.formats.documents import read_json
from halfbyte.training.passages import Passage

SCHEMA = "halfbyte.shortlist/1"
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
STEP = 64  # a head is whole groups of rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortlist:
    """`tokens` by how often they were said. `coverage`: the part of the tokens counted apart that
    are among them; `coverages` of other sizes. Of `vocab` tokens `different` ones were said."""

    tokens: tuple[int, ...]
    vocab: int
    counted: int
    different: int
    coverage: float
    coverages: tuple[tuple[int, float], ...]


def shortlist(
    passages: Sequence[Passage],
    vocab: int,
    *,
    always: Collection[int],
    size: int | None,
    coverage: float,
) -> Shortlist:
    """The tokens that are said most: `size` of them, or as many as cover enough; with those that
    are always taken."""
    if size is not None and size > vocab:
        raise InvalidInputError(f"is more than the vocabulary of {vocab}", where="--size")
    chosen, apart = Counter(_said(passages[::2])), Counter(_said(passages[1::2]))
    order = [*always, *(token for token, _ in chosen.most_common() if token not in always)]
    order += [token for token in range(vocab) if token not in {*order}][: -len(order) % STEP]
    count = size or _enough(order, apart, coverage)
    taken = tuple(order[:count])
    if len(taken) < count:
        raise InvalidInputError(
            f"only {len(order)} tokens were said", where="--size", hint="more --tokens, or fewer"
        )
    return Shortlist(
        tokens=taken,
        vocab=vocab,
        counted=chosen.total() + apart.total(),
        different=len({*chosen, *apart}),
        coverage=_covered(taken, apart),
        coverages=tuple((it, _covered(order[:it], apart)) for it in SIZES if it < len(order)),
    )


def write(found: Shortlist, path: Path) -> None:
    """A JSON file for `read_shortlist`."""
    text = json.dumps(fields(found)).encode()
    write_file(path, text)


def fields(found: Shortlist) -> dict[str, Any]:
    return {"schema": SCHEMA, **asdict(found)}


def read_shortlist(path: Path) -> tuple[int, ...]:
    """The tokens of a file. Raises `IntegrityError` where it is none."""
    document = read_json(path)
    tokens = document.get("tokens")
    if document.get("schema") != SCHEMA or not isinstance(tokens, list):
        raise IntegrityError("is no shortlist", where=path, hint="halfbyte draft shortlist -o")
    return tuple(int(token) for token in tokens)


def _said(passages: Sequence[Passage]) -> Iterator[int]:
    for passage in passages:
        yield from passage.ids[passage.first :]


def _covered(tokens: Sequence[int], counts: Counter[int]) -> float:
    return sum(counts[token] for token in tokens) / max(1, counts.total())


def _enough(order: Sequence[int], counts: Counter[int], coverage: float) -> int:
    """How many of the tokens cover so much, in whole groups."""
    wanted, sum_ = coverage * counts.total(), 0
    for index, token in enumerate(order):
        sum_ += counts[token]
        if sum_ >= wanted:
            return min(len(order), -(-(index + 1) // STEP) * STEP)
    return len(order)
