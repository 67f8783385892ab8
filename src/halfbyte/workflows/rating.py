"""What drafting is worth for a target here: before anybody trains, and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from halfbyte.engine import LookupDrafter, ModelDrafter
from halfbyte.errors import InvalidInputError
from halfbyte.evals.acceptance import Acceptance, Costs, accepted, costs
from halfbyte.evals.texts import OWN_TEXTS
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.kernels.choice import choose
from halfbyte.models.load import load, load_drafter
from halfbyte.quantizer.opening import open_drafter, open_source
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import LoadOptions, ModelSpec, Request, SamplingParams, recipe_of
from halfbyte.training.beginnings import beginning, shape
from halfbyte.training.passages import Library, advised
from halfbyte.training.tensors import Tensors

WINDOW = 1024
Manner = Literal["greedy", "sampled"]
MANNERS: tuple[Manner, ...] = ("greedy", "sampled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """So many prompts of each file, answered with up to `tokens` tokens, drafted `lengths` at a
    time."""

    texts: Mapping[str, Path]
    lengths: Sequence[int] = (4,)
    prompts: int = 64
    tokens: int = 128
    ahead: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """One kind of text, one way to sample, one drafter: its acceptance and the gain expected."""

    text: str
    manner: Manner
    acceptance: Acceptance
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """`assumed`: the gains that rates somebody named would bring with 1, 2, ... drafts a round;
    `drafter` is whose steps were timed: "own", or "untrained", of the usual shape."""

    ops: str
    drafter: Literal["own", "untrained"]
    costs: Costs
    rows: Sequence[Rated]
    assumed: Sequence[float]


class _Job(NamedTuple):
    text: str
    path: Path
    manner: Manner
    kind: str
    length: int


def rate(
    model: str,
    *,
    asked: Asked,
    rates: Sequence[float] = (),
    options: LoadOptions,
    progress: Progress | None = None,
) -> Rating:
    """Measure what a target's drafters get right, and what drafting takes on this machine."""
    place = locate(model)
    source = open_source(str(place), recipe=options.recipe, method=options.method)
    ops = choose(source.spec, options.device, options.dtype, threads=options.threads)
    decoder = load(source, ops)
    own = open_drafter(options.drafter, source, place)
    drafter = load_drafter(_placed(own or untrained(source), asked.ahead), decoder)
    most = max([*asked.lengths, len(rates)])
    taken = costs(decoder, drafter, most=most, kv=options.kv)
    rows: list[Rated] = []
    jobs = [
        _Job(name, path, manner, kind, length)
        for name, path in (asked.texts or OWN_TEXTS).items()
        for manner in MANNERS
        for kind in ("lookup", *([] if own is None else ["model"]))
        for length in asked.lengths
    ]
    for done, job in enumerate(jobs, 1):
        found = accepted(
            decoder,
            LookupDrafter() if job.kind == "lookup" else ModelDrafter(drafter),
            requests(source, job.path, job.manner, asked),
            length=job.length,
            context=min(WINDOW, source.spec.context),
            kv=options.kv,
        )
        spent = taken if job.kind == "model" else replace(taken, draft=0.0)
        gain = spent.gain(found.by_position, found.share)
        rows.append(Rated(text=job.text, manner=job.manner, acceptance=found, gain=gain))
        if progress is not None:
            progress(done, len(jobs))
    return Rating(
        ops=ops.name,
        drafter="untrained" if own is None else "own",
        costs=taken,
        rows=rows,
        assumed=[taken.gain(rates[: count + 1]) for count in range(len(rates))],
    )


def requests(source: Source, path: Path, manner: Manner, asked: Asked) -> list[Request]:
    """The first prompts of a file, to be answered greedily or as the model's makers advise."""
    if source.assets is None:
        raise InvalidInputError("the model has no tokenizer to read texts with", where=path)
    library = Library(source.assets, window=min(WINDOW, source.spec.context), seed=0)
    greedy = SamplingParams(temperature=0)
    sampling = greedy if manner == "greedy" else advised(source.assets, seed=0)
    prompts = zip(library.prompts(path), range(asked.prompts), strict=False)
    return [
        Request(
            prompt_ids=prompt.ids,
            sampling=sampling,
            max_tokens=min(asked.tokens, library.window - len(prompt.ids)),
            stop_ids=library.stop_ids,
            sequence=number,
        )
        for prompt, number in prompts
    ]


def untrained(source: Source) -> Source:
    """A new drafter of the usual shape, in four bits: as fast as one that was taught."""
    spec = shape(source.spec)
    hidden = source.spec.hidden
    weights = beginning(spec, source, torch.zeros(hidden, 2 * hidden))
    return Quantized(Tensors(spec=spec, weights=weights), recipe_of("q4_0"), method="rtn")


def _placed(drafter: Source, ahead: int | None) -> Source:
    """The drafter with its queries so many positions after the last key."""
    if ahead is None:
        return drafter
    layers = tuple(
        replace(layer, attention=replace(layer.attention, ahead=ahead))
        for layer in drafter.spec.layers
    )
    return Placed(drafter, replace(drafter.spec, layers=layers))


class Placed:
    """A source with another spec of the same tensors."""

    def __init__(self, source: Source, spec: ModelSpec) -> None:
        self._source, self.spec = source, spec
        self.schemes, self.assets = source.schemes, source.assets
        self.tensors, self.tensor = source.tensors, source.tensor
