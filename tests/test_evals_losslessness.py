"""The self-test of speculation finds nothing on a sound engine, and what is wrong on another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from commandline import Halfbyte
from fake_decoder import FakeCache, FakeDecoder
from random_drafters import random_drafter

from halfbyte.evals.losslessness import SAMPLINGS, Trial, prove
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.models.decoder import Chunk
from halfbyte.workflows import proving

PROMPTS = [(1, 2, 3), (7,), (4, 5) * 10]


class DependsOnCompany(FakeDecoder):
    """A row is another one where many stand beside it: what a careless kernel does."""

    def outputs(self, chunks: Sequence[Chunk], cache: FakeCache) -> tuple[np.ndarray, np.ndarray]:
        logits, states = super().outputs(chunks, cache)
        return (logits[:, ::-1] if len(logits) > 6 else logits), states


def test_a_sound_decoder_passes() -> None:
    trials = prove(FakeDecoder(), None, PROMPTS, tokens=24)
    assert {trial.sampling for trial in trials} == set(SAMPLINGS)
    assert {trial.drafter for trial in trials} >= {"always right", "always wrong", "lookup"}
    assert all(trial.differing == 0 and trial.tokens == 72 for trial in trials)
    rounds = {trial.drafter: trial.tokens_per_round for trial in trials}
    assert rounds["always wrong"] == 1.0 and (rounds["always right"] or 0) > 6


def test_rows_that_depend_on_company_are_found() -> None:
    trials = prove(DependsOnCompany(), None, PROMPTS, tokens=24)
    wrong = [trial for trial in trials if trial.differing]
    assert wrong and all(trial.first_difference is not None for trial in wrong)


def test_eval_compares_with_the_drafter_beside_the_model(
    halfbyte: Halfbyte, stories260k: Path, tmp_path: Path
) -> None:
    write_gguf(read(stories260k), tmp_path / "model.gguf")
    write_gguf(random_drafter(read(stories260k).spec), tmp_path / "drafter.gguf")
    outcome = halfbyte("eval", tmp_path, "--speculation", 900, "--json", "--threads", 1)
    assert outcome.code == 0, outcome.err
    facts = outcome.document["speculation"]
    assert facts["differing"] == 0 and facts["tokens"] >= 900
    assert {trial["drafter"] for trial in facts["trials"]} >= {"model", "as it runs"}


def test_a_difference_is_a_missed_gate(
    halfbyte: Halfbyte, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(
        drafter="lookup",
        sampling="greedy",
        tokens=9,
        differing=2,
        first_difference=(0, 4),
        tokens_per_round=None,
        speedup=None,
    )
    monkeypatch.setattr(proving, "prove", lambda *_, **__: [trial])
    outcome = halfbyte("eval", stories260k, "--speculation", 100)
    assert outcome.code == 7 and "2 of 9 tokens changed when they were drafted" in outcome.err
    assert "9 tokens, 2 differ" in outcome.out
