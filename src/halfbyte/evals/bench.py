"""How fast a model runs, in tokens per second, and how near that is to what memory allows.

Trials are named as they are read: `prefill@512` is one prompt of 512 tokens, `decode@4096` one
token at a time behind 4096 others, `rows@8` eight rows at once (what verifying drafts costs).
Fixed tokens are fed and nothing is sampled: no tokenizer is needed, and the figure is the engine's.

Medians, because machines are shared. What it is not: a comparison; two programs are compared in one
run, in turn, by the same trials (bench/peers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Protocol

from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import Source
from halfbyte.models.cache import Slot, shape_for
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.specs import KVType, TensorSpec

CHUNK = 512
KINDS = ("prefill", "decode", "rows")
PREFILL = (128, 512, 2048)
DEPTHS = (0, 4096)
ROWS = (1, 2, 4, 8, 16)
ROW_REPEATS = 9


@dataclass(frozen=True, slots=True)
class Trial:
    """What is timed: `kind`, of so many tokens, or behind so many."""

    kind: str
    count: int

    @property
    def name(self) -> str:
        return f"{self.kind}@{self.count}"

    def length(self, decode: int) -> int:
        """The positions it needs, where `decode` tokens are decoded."""
        return self.count + (decode if self.kind == "decode" else 0)


def trial_of(name: str) -> Trial:
    """The trial of that name; `InvalidInputError` for any other."""
    kind, _, count = name.partition("@")
    if kind not in KINDS or not count.isdecimal() or (int(count) == 0 and kind != "decode"):
        raise InvalidInputError(f"'{name}' is no trial", hint="prefill@512, decode@0 or rows@8")
    return Trial(kind, int(count))


def standard(
    context: int,
    *,
    prefill: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    decode: int = 64,
) -> list[Trial]:
    """Prompts, depths and numbers of rows; of those that nobody asked for, what fits a context."""
    if prefill is None:
        prefill = [count for count in PREFILL if count <= context]
    if depths is None:
        depths = [depth for depth in DEPTHS if depth == 0 or depth + decode <= context]
    counts = {"prefill": prefill, "decode": depths, "rows": ROWS}
    return [Trial(kind, count) for kind in KINDS for count in counts[kind]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trial: `n` timed runs, the median of their seconds, and tokens per second from it."""

    test: str
    tokens_per_s: float
    median_s: float
    n: int


class Course(Protocol):
    """One sequence of fixed tokens, that can be set back. `chunk`: the most rows of a forward."""

    chunk: int

    def forward(self, position: int, count: int, *, every: bool) -> None:
        """Runs the tokens [position, position + count) behind those before them.

        Logits are computed of every row, or of the last one. What was behind `position` is taken
        back; only what was run is before it.
        """
        ...


Progress = Callable[[int, int], None]


def run(
    course: Course,
    trials: Sequence[Trial],
    *,
    decode: int,
    repeats: int,
    progress: Progress | None = None,
) -> list[Row]:
    """The rows of all trials: `decode` tokens are decoded, a prompt is run `repeats` times."""
    _fill(course, max(min(CHUNK, trial.length(decode)) for trial in trials))  # warms up
    rows: list[Row] = []
    for done, trial in enumerate(trials, 1):
        match trial.kind:
            case "prefill":
                rows.append(_prefill(course, trial, repeats))
            case "decode":
                rows.append(_decode(course, trial, decode))
            case _:
                rows.append(_rows(course, trial))
        if progress is not None:
            progress(done, len(trials))
    return rows


def bench(
    decoder: Decoder,
    trials: Sequence[Trial],
    *,
    decode: int = 64,
    repeats: int = 3,
    kv: KVType = "bf16",
    progress: Progress | None = None,
) -> list[Row]:
    """`run` on a decoder. Raises `InvalidInputError` where its context is too short."""
    course = DecoderCourse(decoder, max(trial.length(decode) for trial in trials), kv)
    return run(course, trials, decode=decode, repeats=repeats, progress=progress)


class DecoderCourse:
    """A decoder with one sequence."""

    chunk = CHUNK

    def __init__(self, decoder: Decoder, length: int, kv: KVType = "bf16") -> None:
        if length > decoder.spec.context:
            raise InvalidInputError(
                f"{length} positions are beyond the model's {decoder.spec.context}",
                hint="a smaller --prefill, --depth or --decode",
            )
        self._decoder = decoder
        shape = shape_for(context=length, sequences=1, rows=CHUNK, kind=kv)
        self._cache = decoder.new_cache(shape)
        self._pages = list(range(shape.pages))

    def forward(self, position: int, count: int, *, every: bool) -> None:
        slot = Slot(pages=self._pages, length=position, written=position)
        ids = [token(position + i, self._decoder.spec.vocab) for i in range(count)]
        wanted = "all" if every else "last"
        self._decoder.forward([Chunk(slot=slot, token_ids=ids, wanted=wanted)], self._cache)


def token(position: int, vocab: int) -> int:
    """The token that every course has at a position."""
    return position * 7919 % vocab


def row_of(test: str, tokens: float, seconds: Sequence[float]) -> Row:
    """The row of runs of `tokens` tokens that took these seconds."""
    middle = median(seconds)
    return Row(test=test, tokens_per_s=tokens / middle, median_s=middle, n=len(seconds))


def step_bytes(source: Source) -> int:
    """The stored bytes that decoding one token reads: all but tables of which it takes one row."""
    return sum(_read_bytes(tensor, source) for tensor in source.spec.tensors())


def _read_bytes(tensor: TensorSpec, source: Source) -> int:
    spec, stored = source.spec, source.schemes[tensor.name].bytes(tensor.shape)
    if tensor.name == "per_layer.embed.weight":
        return 0
    if tensor.name == "embed.weight":
        return stored if spec.tied_head else 0
    if len(tensor.shape) < 3:
        return stored
    experts = spec.layers[int(tensor.name.split(".")[1])].experts
    assert experts is not None, tensor.name
    return stored * experts.used // experts.count


def _fill(course: Course, count: int) -> None:
    """`count` tokens from the beginning on."""
    for start in range(0, count, course.chunk):
        course.forward(start, min(course.chunk, count - start), every=False)


def _prefill(course: Course, trial: Trial, repeats: int) -> Row:
    times = [_timed(lambda: _fill(course, trial.count)) for _ in range(repeats)]
    return row_of(trial.name, trial.count, times)


def _decode(course: Course, trial: Trial, count: int) -> Row:
    _fill(course, trial.count)
    times = [
        _timed(lambda at=trial.count + i: course.forward(at, 1, every=False)) for i in range(count)
    ]
    return row_of(trial.name, 1, times)


def _rows(course: Course, trial: Trial) -> Row:
    times = [_timed(lambda: course.forward(0, trial.count, every=True)) for _ in range(ROW_REPEATS)]
    return row_of(trial.name, trial.count, times)


def _timed(work: Callable[[], None]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start
