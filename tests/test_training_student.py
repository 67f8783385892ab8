"""The student is the decoder, its loss is the divergence, its gradients are autograd's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import CONFIGS, MemorySource, oracle, source_of

from halfbyte.evals.reference import Reference
from halfbyte.evals.texts import Window
from halfbyte.formats.checkpoint import read
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import recipe_of
from halfbyte.training.distilling import Distillation, Lesson
from halfbyte.training.divergence import divergence
from halfbyte.training.fisher import STATES
from halfbyte.training.heads import StoredHead
from halfbyte.training.modes import Trainer
from halfbyte.training.ops import TrainingOps
from halfbyte.training.order import Order
from halfbyte.training.samples import Samples
from halfbyte.training.student import Student
from halfbyte.training.teacher import taught

LENGTH = 160  # longer than a sliding window of the test model


def windows(vocab: int, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (count, LENGTH + 1))


@pytest.fixture(scope="module")
def student(tiny_gemma4: Path) -> Student:
    source = read(tiny_gemma4)
    stored = dict(Quantized(source, recipe_of("q4_0"), method="rtn").tensors())
    tensors = Trainer(mode="full").tensors(source.tensor, stored)
    return Student(source.spec, tensors, TrainingOps(), again=False)


def test_what_learns_is_what_runs(student: Student, tiny_gemma4: Path) -> None:
    """The states of the training forward are the decoder's over the file that would be written."""
    source = read(tiny_gemma4)
    weights = {name: decode(q) for name, q in student.tensors.results()}
    written = MemorySource(source.spec, weights, recipe_of("f32"))
    decoder = load(written, ReferenceOps(exact_rows=False))
    ids = windows(source.spec.vocab, 2)
    with torch.no_grad():
        states, head = student.states(ids[:, :-1].tolist())
    assert isinstance(head, torch.Tensor)
    pages = list(range(4))
    shape = CacheShape(pages=4, page_len=64, ring_slack=LENGTH, kind="f32")
    for row, window in enumerate(ids[:, :-1].tolist()):
        cache = decoder.new_cache(shape)
        chunk = Chunk(slot=Slot(pages=pages), token_ids=window, wanted="all")
        _, theirs = decoder.outputs([chunk], cache)
        ours = states[row * LENGTH : (row + 1) * LENGTH].numpy()
        assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()


def test_computing_layers_again_changes_nothing(student: Student, tiny_gemma4: Path) -> None:
    ids = windows(student.spec.vocab, 2)[:, :-1].tolist()
    found: list[dict[str, torch.Tensor]] = []
    for again in (False, True):
        other = Student(student.spec, student.tensors, TrainingOps(), again=again)
        student.tensors.clear_gradients()
        states, head = other.states(ids)
        (states.square().mean() + head.square().mean()).backward()  # type: ignore
        parameters = student.tensors.parameters
        found.append({name: it.grad.clone() for name, it in parameters.items()})  # type: ignore
    for name, first in found[0].items():
        assert torch.equal(first, found[1][name]), name


def naive(
    states: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, cap: float | None
) -> torch.Tensor:
    z = states @ head.t()
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    log_p, log_t = z.log_softmax(-1), teacher.log_softmax(-1)
    return (log_t.exp() * (log_t - log_p)).sum(-1)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("typical", [None, 0.3])
def test_a_divergence_in_pieces_is_the_whole(
    cap: float | None, shared: bool, typical: float | None
) -> None:
    chance = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance)

    states, head = drawn(37, 16).requires_grad_(), drawn(50, 16).requires_grad_()
    teacher, weights = drawn(37, 50), torch.rand(37, generator=chance)
    targets = torch.randint(0, 50, (37,), generator=chance)
    shares = torch.rand(37, generator=chance) if shared else None
    each = naive(states, head, teacher, cap)
    if typical is not None:
        each = typical * (1 + each / typical).log()
    if shares is not None:
        z = states @ head.t()
        log_p = (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)
        said = -log_p.gather(1, targets[:, None])[:, 0]
        each = (1 - shares) * each + shares * said
    wanted = (each * weights).sum() / weights.sum()
    expected = torch.autograd.grad(wanted, (states, head))
    found = divergence(
        states,
        head,
        lambda start, stop: teacher[start:stop].clone(),
        weights,
        softcap=cap,
        targets=targets,
        shares=shares,
        typical=typical,
        at_once=50 * 8,
    )
    gradients = torch.autograd.grad(found, (states, head))
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_stored_head_is_decoded_in_slices(
    tiny_gemma4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = read(tiny_gemma4).tensor("embed.weight")
    whole = StoredHead(stored, "cpu")
    monkeypatch.setattr("halfbyte.training.heads.KEPT", 0)
    monkeypatch.setattr("halfbyte.training.heads.SLICE", 100 * stored.width)
    sliced = StoredHead(stored, "cpu")
    x = torch.randn(3, stored.width, generator=torch.Generator().manual_seed(0))
    z = whole.product(x)
    assert torch.allclose(sliced.product(x), z, atol=1e-5)
    assert torch.allclose(sliced.back(z), whole.back(z), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma3-softcap", "gemma4-everything", "tiny"])
def test_a_teacher_says_what_the_original_says(
    name: str, tiny_gemma4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read two windows at a time, of three."""
    source = (
        read(tiny_gemma4) if name == "tiny" else source_of(oracle(CONFIGS[name]), CONFIGS[name])
    )
    length = min(LENGTH, source.spec.context)
    monkeypatch.setattr("halfbyte.training.teacher.AT_ONCE", 2 * length + 1)
    ids = windows(source.spec.vocab, 3)[:, : length + 1]
    samples = Samples(
        token_ids=ids,
        weights=np.ones((3, length), np.float32),
        supervised=np.zeros(3, np.float32),
    )
    reference = Reference(source, ReferenceOps(exact_rows=False))
    found = taught(source, [samples], weights=None)[0]
    teacher = found.logits(found.states([2, 0]))
    baseline = reference.read([[Window(token_ids=ids[i].tolist(), first=0) for i in (2, 0)]])[0]
    for rows in ((0, 9), (length, length + 5)):
        assert np.allclose(teacher(*rows).numpy(), baseline.logits(*rows), atol=1e-4)


def test_errors_of_final_states_cost_by_their_metric(student: Student, tiny_gemma4: Path) -> None:
    """Beside the divergence, of rows that count unlike, in batches of two parts."""
    source, chance = read(tiny_gemma4), torch.Generator().manual_seed(1)
    samples = Samples(
        token_ids=windows(source.spec.vocab, 4),
        weights=torch.rand(4, LENGTH, generator=chance).numpy(),
        supervised=np.zeros(4, np.float32),
    )
    lesson = Lesson(samples, taught(source, [samples], weights=None)[0])
    metric = torch.randn(source.spec.hidden, source.spec.hidden, generator=chance)
    metric = metric @ metric.t()  # beside which the divergence is small
    leaves = student.tensors.parameters

    def learned(metric: torch.Tensor | None) -> dict[str, torch.Tensor]:
        order = Order(count=4, batch=4)
        Distillation(student, lesson, lesson, order, at_once=2, metric=metric).learn(0)
        return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}

    plain, beside = learned(None), learned(metric)
    student.tensors.clear_gradients()
    states, _ = student.states(samples.inputs(range(4)))
    errors = states - lesson.teacher.states(range(4))
    rows = torch.from_numpy(samples.weights).flatten()
    ((errors @ metric * errors).sum(-1) @ rows / rows.sum() * STATES / 2).backward()
    alone = torch.cat([leaf.grad.flatten() for leaf in leaves.values() if leaf.grad is not None])
    apart = torch.cat([(beside[name] - plain[name]).flatten() for name in leaves])
    torch.testing.assert_close(apart, alone, rtol=1e-3, atol=1e-4 * float(alone.norm()))
