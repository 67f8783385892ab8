"""Rounds of drafts with gradients: they are the rounds that run, and their gradients are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import CONFIGS, oracle, relative_error, source_of
from random_drafters import random_drafter
from torch import Tensor

from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load, load_drafter
from halfbyte.training.acceptance import EAGER, judge
from halfbyte.training.passages import Passage
from halfbyte.training.rounds import Windows, rounds
from halfbyte.training.seen import RowLayout, Seen

LENGTHS, FIRSTS = (70, 5, 33), (1, 3, 20)  # the first beyond two windows of 24
STEPS = 3


def passages(vocab: int) -> list[Passage]:
    chance = np.random.default_rng(3)
    return [
        Passage(ids=tuple(chance.integers(0, vocab, length).tolist()), first=first)
        for length, first in zip(LENGTHS, FIRSTS, strict=True)
    ]


@pytest.mark.parametrize("config", ["llama", "gemma3", "gemma4-unified", "gemma4-per-layer"])
@pytest.mark.parametrize("shortlist", [False, True])
def test_they_are_the_rounds_that_run(config: str, shortlist: bool, tmp_path: Path) -> None:
    target_source = source_of(oracle(CONFIGS[config]), CONFIGS[config])
    options = {"head_rows": 40} if shortlist else {}
    source = random_drafter(target_source.spec, **options)
    texts = passages(target_source.spec.vocab)

    learner = load(target_source, ReferenceOps(exact_rows=False))
    model = load_drafter(source, learner)
    seen = Seen(RowLayout.of(learner.spec, model.reads), texts, tmp_path)
    seen.make(learner)
    windows = Windows(
        texts,
        [seen.window(index) for index in range(len(texts))],
        learner.weights.head.dense,
        learner.spec.logit_softcap,
        "cpu",
    )
    tokens = source.weights["head.tokens"].long() if shortlist else None
    with torch.no_grad():
        found = rounds(
            model,
            source.weights["head.weight"],
            windows,
            steps=STEPS,
            fade=0.8,
            least=0.1,
            tokens=tokens,
        )
    assert [len(it.right) for it in found] == [
        sum(max(0, length - first - step) for length, first in zip(LENGTHS, FIRSTS, strict=True))
        for step in range(1, STEPS + 1)
    ]
    target = load(target_source, ReferenceOps())
    drafter = load_drafter(source, target)
    cache = target.new_cache(CacheShape(pages=2, ring_slack=80, kind="f32"))
    overlaps: list[list[float]] = [[] for _ in range(STEPS)]
    for text in texts:
        logits, states = target.outputs(
            [Chunk(slot=Slot(pages=[0, 1]), token_ids=text.ids, wanted="all")], cache
        )
        wanted = torch.from_numpy(logits.copy()).softmax(-1)
        states = states.copy()
        for at in range(text.first - 1, len(text.ids) - 2):
            slot = Slot(pages=[0, 1], length=at + 1, written=at + 1)
            state = states[at : at + 1]
            for step in range(1, min(STEPS, len(text.ids) - 2 - at) + 1):
                out, state = drafter.forward([text.ids[at + step]], state, [slot], cache)
                q = torch.from_numpy(out[0].copy()).softmax(-1)
                state = state.copy()
                overlaps[step - 1].append(float(torch.minimum(wanted[at + step], q).sum()))
    for ours, theirs in zip(found, overlaps, strict=True):
        # The keys are bf16 and the states f16 in what was seen.
        assert relative_error(ours.overlap.numpy(), np.array(theirs)) < 0.02


def plain_loss(states: Tensor, head: Tensor, p: Tensor, weights: Tensor, tokens: Tensor | None):
    if tokens is not None:
        p = p[:, tokens]
    q = (states @ head.T).softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    mix = torch.exp(-EAGER * overlap.detach())
    held = p / p.sum(-1, keepdim=True)
    crossed = -(held * q.log()).sum(-1)
    return (weights * (mix * crossed + (1 - mix) * (1 - overlap))).sum()


@pytest.mark.parametrize("shortlist", [False, True])
def test_the_gradient_is_autograds(shortlist: bool) -> None:
    chance = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance)

    tokens = torch.randperm(50, generator=chance)[:30] if shortlist else None
    p = (2 * normal(12, 50)).softmax(-1)
    taken, weights = torch.randint(0, 50, (12,), generator=chance), torch.rand(12)
    values = normal(12, 8), normal(30 if shortlist else 50, 8)
    ours, theirs = ([it.clone().requires_grad_() for it in values] for _ in range(2))
    judged = judge(ours[0], ours[1], p, taken, weights, tokens=tokens)
    expected = plain_loss(theirs[0], theirs[1], p, weights, tokens)
    assert torch.allclose(judged.loss, expected, rtol=1e-5)
    (2 * judged.loss).backward()
    (2 * expected).backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    held = range(50) if tokens is None else tokens.tolist()
    q = torch.zeros(12, 50)
    q[:, list(held)] = (values[0] @ values[1].T).softmax(-1)
    row = torch.arange(12)
    assert torch.allclose(judged.survival, (q / p)[row, taken].clamp(max=1), rtol=1e-4)
    assert torch.equal(judged.right, q.argmax(-1) == p.argmax(-1))


def test_what_was_seen_is_made_once(tmp_path: Path) -> None:
    source = source_of(oracle(CONFIGS["llama"]), CONFIGS["llama"])
    texts = passages(source.spec.vocab)
    target = load(source, ReferenceOps(exact_rows=False))
    layout = RowLayout.of(target.spec, (1, 0, 1))
    assert layout.reads == (0, 1)
    whole = Seen(layout, texts, tmp_path)
    whole.make(target)
    again = Seen(layout, texts, tmp_path)
    assert (tmp_path / "seen.bin").stat().st_size == again.bytes
    again.make(None)  # type: ignore[arg-type]
    for index in range(3):
        one, other = whole.window(index), again.window(index)
        assert torch.equal(one.states, other.states)
        assert one.kept.keys() == {0, 1}
