"""Twins of the drafters: a step equals Transformers' assistant, from its own files and a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assistants import PAIRS, VOCAB, Pair, pair
from oracle import relative_error

from halfbyte.formats.checkpoint import Checkpoint, read, write_gguf
from halfbyte.kernels.contract import OpSet
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load, load_drafter

LENGTH, STEPS = 60, 4  # more than two windows of 24
IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, LENGTH)]
BONUS = 17
OPS = [ReferenceOps] + ([lambda: CPUOps(threads=2)] if instruction_set() else [])


@pytest.fixture(scope="module", params=PAIRS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A pair of Transformers, and our source of the assistant as it saves it."""
    made = pair(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    made.assistant.save_pretrained(folder)
    return made, read(folder)


def steps(made: Pair, source: Checkpoint, ops: OpSet, *, junk: int = 0):
    """Our outputs for what each of Transformers' steps was given; `junk` rejected tokens behind."""
    target = load(made.target_source, ops)
    drafter = load_drafter(source, target)
    cache = target.new_cache(CacheShape(pages=2, ring_slack=LENGTH, kind="f32"))
    slot = Slot(pages=[1, 0])
    target.forward([Chunk(slot=slot, token_ids=IDS, wanted="none")], cache)
    if junk:
        target.forward([Chunk(slot=slot, token_ids=[3] * junk, wanted="none")], cache)
        slot.rollback(junk)
    for step in made.drafted(IDS, BONUS, STEPS):
        logits, states = drafter.forward([step.token], step.given, [slot], cache)
        yield step, logits[0].copy(), states[0].copy()


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("junk", [0, 5])
def test_a_step_equals_transformers(both: tuple[Pair, Checkpoint], ops: Any, junk: int) -> None:
    made, source = both
    clustered = source.spec.drafter.centroids is not None
    for step, logits, state in steps(made, source, ops(), junk=junk):
        # Transformers gives the tokens outside of the clusters less than the least inside.
        held = step.logits > step.logits.min() if clustered else np.full(VOCAB, True)
        assert np.array_equal(np.isfinite(logits), held)
        assert relative_error(logits[held], step.logits[held]) < 5e-5
        assert relative_error(state, step.state) < 5e-5


def test_a_gguf_of_it_is_the_same(both: tuple[Pair, Checkpoint], tmp_path: Path) -> None:
    made, source = both
    write_gguf(source, tmp_path / "drafter.gguf")
    found = read(tmp_path / "drafter.gguf")
    assert found.spec == source.spec
    ours, again = (list(steps(made, it, ReferenceOps())) for it in (source, found))
    for (_, logits, state), (_, its_logits, its_state) in zip(ours, again, strict=True):
        assert np.array_equal(logits, its_logits) and np.array_equal(state, its_state)


@pytest.mark.parametrize("name", PAIRS)
def test_the_first_state_is_what_transformers_starts_from(name: str) -> None:
    made = pair(name)
    target = load(made.target_source, ReferenceOps())
    cache = target.new_cache(CacheShape(pages=1, ring_slack=LENGTH, kind="f32"))
    _, states = target.outputs([Chunk(slot=Slot(pages=[0]), token_ids=IDS)], cache)
    first = made.drafted(IDS, BONUS, 1)[0]
    assert relative_error(states, first.given) < 5e-5
