"""How fast a decoder runs, in tokens per second, and how near that is to what memory allows.

Tests are named as they are read: `prefill@512` is one prompt of 512 tokens, `decode@4096` one
token at a time behind 4096 others, `rows@8` eight rows at once (what verifying drafts costs).
Fixed tokens are fed and nothing is sampled: no tokenizer is needed, and the figure is the engine's.

Medians, because machines are shared. What it is not: a comparison; two programs are compared in one
run, in turn (bench/peers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from halfbyte.errors import InvalidInputError
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder, Wanted
from halfbyte.specs import KVType

CHUNK = 512
PAGE_LEN = 64
PREFILL_REPEATS = 3
ROWS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One test: `n` timed runs, the median of their seconds, and tokens per second from it."""

    test: str
    tokens_per_s: float
    median_s: float
    n: int


Progress = Callable[[int, int], None]


def bench(
    decoder: Decoder,
    *,
    prefill: Sequence[int] = (128, 512),
    decode: int = 64,
    depths: Sequence[int] = (0,),
    kv: KVType = "bf16",
    progress: Progress | None = None,
) -> list[Row]:
    """The rows of all tests. Raises `InvalidInputError` where the model's context is too short."""
    course = _Course(decoder, max((*prefill, *(depth + decode for depth in depths))), kv)
    tests: list[Callable[[], Row]] = []
    tests += [lambda count=count: _prefill(course, count) for count in prefill]
    tests += [lambda depth=depth: _decode(course, depth, decode) for depth in depths]
    tests += [lambda count=count: _rows(course, count) for count in ROWS]
    rows: list[Row] = []
    course.fill(min(CHUNK, course.length))  # warms up
    for done, test in enumerate(tests, 1):
        rows.append(test())
        if progress is not None:
            progress(done, len(tests))
    return rows


class _Course:
    """A decoder with one sequence that is set back and forth."""

    def __init__(self, decoder: Decoder, length: int, kv: KVType) -> None:
        if length > decoder.spec.context:
            raise InvalidInputError(
                f"{length} positions are beyond the model's {decoder.spec.context}",
                hint="a smaller --prefill, --depth or --decode",
            )
        self.length = max(length, ROWS[-1])
        self._decoder = decoder
        pages = -(-self.length // PAGE_LEN)
        shape = CacheShape(pages=pages, page_len=PAGE_LEN, ring_slack=CHUNK, kind=kv)
        self._cache = decoder.new_cache(shape)
        self._pages = list(range(pages))

    def forward(self, position: int, count: int, wanted: Wanted = "last") -> None:
        slot = Slot(pages=self._pages, length=position, written=position)
        vocab = self._decoder.spec.vocab
        ids = [(position + i) * 7919 % vocab for i in range(count)]
        self._decoder.forward([Chunk(slot=slot, token_ids=ids, wanted=wanted)], self._cache)

    def fill(self, count: int) -> None:
        """`count` tokens from an empty cache on."""
        for start in range(0, count, CHUNK):
            self.forward(start, min(CHUNK, count - start))


def _row(test: str, tokens: int, seconds: Sequence[float]) -> Row:
    middle = median(seconds)
    return Row(test=test, tokens_per_s=tokens / middle, median_s=middle, n=len(seconds))


def _prefill(course: _Course, count: int) -> Row:
    times = [_timed(lambda: course.fill(count)) for _ in range(PREFILL_REPEATS)]
    return _row(f"prefill@{count}", count, times)


def _decode(course: _Course, depth: int, count: int) -> Row:
    course.fill(depth)
    times = [_timed(lambda at=depth + i: course.forward(at, 1)) for i in range(count)]
    return _row(f"decode@{depth}", 1, times)


def _rows(course: _Course, count: int) -> Row:
    times = [_timed(lambda: course.forward(0, count, "all")) for _ in range(9)]
    return _row(f"rows@{count}", count, times)


def _timed(run: Callable[[], None]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start
