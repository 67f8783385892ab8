"""Laws of the integers: nothing is given twice, lost, or taken back twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.engine.pages import PageAllocator
from halfbyte.engine.scheduler import Scheduler
from halfbyte.engine.sequence import Chosen
from halfbyte.errors import DoesNotFitError, InvalidInputError
from halfbyte.models.cache import CacheShape
from halfbyte.specs import Request


def scheduler(*, pages=8, rings=2, page_len=4, context=32, prefill_chunk=8) -> Scheduler:
    shape = CacheShape(pages=pages, page_len=page_len, rings=rings, ring_slack=prefill_chunk)
    return Scheduler(shape, context=context, prefill_chunk=prefill_chunk)


def request(prompt_len: int, max_tokens: int | None = None) -> Request:
    return Request(prompt_ids=(1,) * prompt_len, max_tokens=max_tokens)


def counts(it: Scheduler) -> dict[int, int]:
    """What the next step computes, by sequence; it is then taken as computed."""
    work = {item.sequence.number: item.count for item in it.schedule()}
    for sequence in it.running.copy():
        sequence.slot.advance(work.get(sequence.number, 0))
        if not sequence.pending:
            sequence.commit([Chosen(1)])
        if sequence.finish_reason:
            it.remove(sequence)
    return work


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_random_allocation_keeps_integrity(moves):
    allocator = PageAllocator(20)
    held: list[list[int]] = []
    for give_back, number in moves:
        if give_back and held:
            allocator.free(held.pop(number % len(held)))
        elif number <= allocator.available:
            held.append(allocator.alloc(number))
        allocator.check_integrity()
        given_out = [page for pages in held for page in pages]
        assert len(set(given_out)) == len(given_out) == 20 - allocator.available


def test_misuse_is_refused_and_changes_nothing():
    allocator = PageAllocator(4)
    pages = allocator.alloc(3)
    with pytest.raises(AssertionError, match="1 free"):
        allocator.alloc(2)
    with pytest.raises(AssertionError, match="not all held"):
        allocator.free([*pages, 3])
    with pytest.raises(AssertionError, match="not all held"):
        allocator.free([pages[0], pages[0]])
    allocator.free(pages)
    with pytest.raises(AssertionError, match="not all held"):
        allocator.free(pages)
    allocator.check_integrity()
    assert allocator.available == 4


def test_admission_reserves_the_whole_length_in_order_of_arrival():
    it = scheduler(pages=8, rings=3)
    outbox = []
    first, second, third = (it.add(request(*sizes), outbox) for sizes in ((9, 12), (5, 12), (1, 1)))
    it.schedule()
    # 9 + 12 ids are 20 positions, for the last id is never computed; the second must wait, and
    # the third with it although it would fit.
    assert [len(sequence.slot.pages) for sequence in it.running] == [5]
    assert list(it.waiting) == [second, third]
    it.remove(first)
    it.schedule()
    assert it.running == [second, third]
    it.check_integrity()


def test_a_long_prompt_does_not_starve_decoding():
    it = scheduler(pages=32, rings=3, context=64, prefill_chunk=8)
    for sizes in ((1, 9), (20, 1), (6, 1)):
        it.add(request(*sizes), [])
    # The one-row prompt is no burden on the budget; the older prompt goes first.
    assert [counts(it) for _ in range(4)] == [
        {0: 1, 1: 8},
        {0: 1, 1: 8},
        {0: 1, 1: 4, 2: 4},
        {0: 1, 2: 2},
    ]


def test_what_can_never_run_is_refused_at_the_door():
    it = scheduler(pages=4, page_len=4, context=32)
    with pytest.raises(InvalidInputError, match=r"33 tokens.* 32\n.*--context 33"):
        it.add(request(33), [])
    with pytest.raises(DoesNotFitError, match=r"17 positions.* 16\n"):
        it.add(request(10, 8), [])
    it.add(request(10, 7), [])
    assert [item.count for item in it.schedule()] == [8]
