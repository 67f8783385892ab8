"""How much is drafted: the arithmetic of costs, and what it makes of drafters on a fake clock."""

from __future__ import annotations

import numpy as np
import pytest
from drafters import FunctionDrafter, Next, at_random, right, wrong
from fake_decoder import VOCAB, FakeDecoder

from halfbyte.engine import Drafting, DraftStats, Engine, ModelDrafter
from halfbyte.engine.drafters import Ask, margin
from halfbyte.engine.drafting import MOST
from halfbyte.engine.pace import GUESS, Acceptance, Costs, best_plan, most_tokens
from halfbyte.engine.sequence import Sequence
from halfbyte.models.cache import Slot
from halfbyte.specs import Request, SamplingParams

CPU = {1: 1.0, 2: 1.23, 4: 1.35, 8: 1.7}  # seconds by rows, as measured on a CPU


def costs(seconds: dict[int, float]) -> Costs:
    learned = Costs()
    learned.learn(1, 99.0)  # warms up
    for rows, time in seconds.items():
        learned.learn(rows, time)
    return learned


def test_costs_are_medians_with_lines_between() -> None:
    empty = Costs()
    assert empty.at(3) is None
    empty.learn(1, 50.0)
    assert empty.at(1) is None, "the first time is a warm-up"
    learned = costs({1: 1.0, 5: 3.0})
    learned.learn(1, 1.0)
    learned.learn(1, 70.0)
    assert (learned.at(1), learned.at(3), learned.at(5), learned.at(7)) == (1.0, 2.0, 3.0, 4.0)
    assert learned.measured(3) is None
    assert costs({4: 2.0}).at(5) == 2.0 * (1 + GUESS)
    assert costs({1: 3.0, 4: 2.0}).at(9) == 2.0, "more rows are never cheaper than fewer"


def test_acceptance_moves_from_the_prior_to_what_is_seen_lately() -> None:
    acceptance = Acceptance(lambda level: 0.5)
    assert acceptance.rate(1) == 0.5
    for _ in range(300):
        acceptance.learn([1, 2, 3], 1)  # the first right, the second wrong, the third not tried
    assert acceptance.rate(1) > 0.95 and acceptance.rate(2) < 0.05 and acceptance.rate(3) == 0.5
    for _ in range(300):
        acceptance.learn([1], 0)
    assert acceptance.rate(1) < 0.05


def test_the_best_length_is_that_of_the_most_tokens_per_second() -> None:
    forward = costs(CPU)
    for rates, step_s, length in (
        ([0.9] * 7, 0.02, 7),
        ([0.8] * 7, 0.04, 5),
        ([0.6] * 7, 0.04, 3),
        ([0.6] * 7, 0.5, 0),
        ([0.1] * 7, 0.04, 0),
        ([], 0.0, 0),
    ):
        plan = best_plan(rates, forward, step_s=step_s)
        assert plan.length == length, (rates, plan)
        speeds = [
            (1 + most_tokens(rates[:k])) / (k * step_s + (forward.at(k + 1) or 0))
            for k in range(len(rates) + 1)
        ]
        assert plan.speed == pytest.approx(max(speeds))
        if length:  # a draft must earn what its row and step take, at that speed
            row_s = ((forward.at(length + 1) or 0) - 1.0) / length + step_s
            assert plan.floor == pytest.approx(row_s * plan.speed)


def test_several_sequences_share_the_rows_of_a_forward() -> None:
    steep = costs({1: 1.0, 2: 1.1, 4: 2.0, 8: 4.0, 16: 8.0})
    alone, together = (best_plan([0.7] * 7, steep, sequences=count) for count in (1, 4))
    assert alone.length == 1 and together.length == 0
    assert together.speed == 2.0


class Course:
    """An engine on a fake clock: forwards cost by their rows, every draft its step."""

    def __init__(self, following: Next, step_s: float = 0.04) -> None:
        self.now = 0.0
        self.drafter = FunctionDrafter(following)
        self._step_s = step_s
        self._table = costs(CPU)
        decoder = FakeDecoder()
        self._outputs, decoder.outputs = decoder.outputs, self._forward
        self._propose, self.drafter.propose = self.drafter.propose, self._steps
        self.engine = Engine(
            decoder,
            context=2400,
            drafting=Drafting(drafters=(self.drafter,)),
            clock=lambda: self.now,
        )

    def run(self, count: int) -> tuple[float, DraftStats]:
        """Seconds for so many tokens, and what was drafted."""
        before = self.now
        request = Request(prompt_ids=(1, 2, 3), max_tokens=count)
        (done,) = self.engine.generate([request])
        assert done.draft is not None
        return self.now - before, done.draft

    def _forward(self, chunks, cache):
        self.now += self._table.at(sum(len(chunk.token_ids) for chunk in chunks)) or 0.0
        return self._outputs(chunks, cache)

    def _steps(self, asks, cache):
        self.now += self._step_s * max(ask.length for ask in asks)
        return self._propose(asks, cache)


def test_a_drafter_that_is_always_wrong_costs_little_once_known() -> None:
    course = Course(wrong)
    course.run(100)
    seconds, draft = course.run(1000)
    assert seconds < 1.02 * 1000
    assert draft.accepted == 0 and 0 < draft.rounds < 20, "it is tried again now and then"
    assert draft.speedup == pytest.approx(1000 / seconds, rel=0.01)


def test_a_drafter_that_is_always_right_drafts_all_it_may() -> None:
    course = Course(right)
    course.run(50)
    seconds, draft = course.run(800)
    assert draft.tokens_per_round == pytest.approx(MOST + 1, rel=0.05)
    assert seconds == pytest.approx(800 * (1.7 + MOST * 0.04) / (MOST + 1), rel=0.05)
    assert draft.speedup == pytest.approx(800 / seconds, rel=0.02)


def test_a_drafter_between_drafts_as_many_as_pay() -> None:
    course = Course(at_random(VOCAB, chance=0.6))
    course.run(100)
    _, draft = course.run(1500)
    assert 2 < draft.proposed / draft.rounds < 5
    assert draft.speedup is not None and draft.speedup > 1.3


def test_one_that_got_better_is_found_again() -> None:
    course = Course(wrong)
    course.run(300)
    course.drafter.following = right
    _, draft = course.run(2000)
    assert draft.tokens_per_round is not None and draft.tokens_per_round > 6
    assert draft.plain_rounds < 500


class Oracle:
    """In place of a drafter's model: logits [VOCAB] of each step as given, states of zeros."""

    def __init__(self, *steps: np.ndarray) -> None:
        self.steps = iter(steps)

    def forward(self, token_ids, states, slots, cache):
        return next(self.steps)[None], np.zeros((1, 4), dtype=np.float32)


class OnHost:
    """In place of a cache: nothing is chosen on a device."""

    chooses = False


def running() -> Sequence:
    sequence = Sequence(
        number=0,
        request=Request(prompt_ids=(1, 2), sampling=SamplingParams(temperature=0)),
        limit=99,
        outbox=[],
        ids=[1, 2, 3],
        slot=Slot(length=2),
    )
    sequence.state = np.zeros(4, dtype=np.float32)
    return sequence


def peaked(token: int, height: float) -> np.ndarray:
    row = np.zeros(VOCAB, dtype=np.float32)
    row[token] = height
    return row


def test_a_model_stops_drafting_where_it_is_unsure() -> None:
    model = Oracle(peaked(7, 9.0), peaked(8, 9.0), peaked(9, 1.0), peaked(6, 9.0))
    (proposal,) = ModelDrafter(model).propose([Ask(running(), 4, 0.6)], OnHost())
    assert proposal.token_ids == [7, 8], "the third is unsure"
    assert proposal.steps == 3
    model = Oracle(peaked(7, 9.0), peaked(8, 9.0), peaked(9, 1.0), peaked(6, 9.0))
    (proposal,) = ModelDrafter(model).propose([Ask(running(), 4, 0.0)], OnHost())
    assert proposal.token_ids == [7, 8, 9, 6]


@pytest.mark.parametrize("best", [0, 7, 299])
def test_the_margin_is_that_of_the_best_over_the_next(best: int) -> None:
    row = np.random.default_rng(0).normal(size=300).astype(np.float32)
    row[best], row[5] = 9.0, -np.inf
    assert margin(row) == pytest.approx(9.0 - np.sort(row)[-2])
    assert margin(np.full(3, 1.0, dtype=np.float32)) == 0.0
    assert margin(np.float32([2.0, -np.inf])) == np.inf
