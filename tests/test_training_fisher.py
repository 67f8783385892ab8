"""What errors cost, and that a training which holds on to it does not leave the best integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import MemorySource
from test_quantizer_blockwise import calibration, source
from torch import Tensor

from halfbyte.errors import IntegrityError
from halfbyte.formats.checkpoint import read
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.yaqa import solve
from halfbyte.specs import SCHEMES
from halfbyte.training import fisher
from halfbyte.training.adamw import AdamW
from halfbyte.training.divergence import divergence
from halfbyte.training.fisher import Form, Gathered, Hold, gathered
from halfbyte.training.grid import Places
from halfbyte.training.modes import Rates, Trainer
from halfbyte.training.ops import TrainingOps
from halfbyte.training.student import Student, Tensors

ROWS, WIDTH = 48, 128
Q4_0 = SCHEMES["q4_0"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(size: int, seed: int) -> Tensor:
    """Of numbers of which few directions matter."""
    x = drawn(4 * size, size, seed=seed) * torch.linspace(3, 0.1, size) @ drawn(size, size, seed=9)
    return x.t() @ x / len(x) / size


def form(*stack: int) -> Form:
    count = stack[0] if stack else 1
    return Form(
        inputs=torch.stack([moment(WIDTH, 1 + i) for i in range(count)]),
        outputs=torch.stack([moment(ROWS, 5 + i) for i in range(count)]) * 1e-3,
    )


@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_form_is_what_its_derivatives_say(stack: tuple[int, ...]) -> None:
    """The gradient is autograd's of the cost; along one weight the cost is a parabola."""
    found, errors = form(*stack), drawn(*stack, ROWS, WIDTH, seed=3) * 0.01
    leaf = errors.clone().requires_grad_()
    cost = (found.outputs @ leaf @ found.inputs).view_as(leaf).mul(leaf).sum() / 2
    cost.backward()
    assert leaf.grad is not None
    assert torch.allclose(found.gradient(errors), leaf.grad, rtol=1e-4, atol=1e-8)
    assert found.cost(errors) == pytest.approx(cost.item(), rel=1e-5)
    at, nudge = (*(0 for _ in stack), 7, 11), 0.05
    costs: list[float] = []
    for sign in (-1, 0, 1):
        moved = errors.clone()
        moved[at] += sign * nudge
        costs.append(found.cost(moved))
    second = (costs[0] - 2 * costs[1] + costs[2]) / nudge**2
    diagonal = found.diagonal.view_as(errors)
    assert float(diagonal[at]) == pytest.approx(second, rel=1e-2)


def test_at_rest_a_weight_has_no_gradient() -> None:
    found, original = form(), drawn(ROWS, WIDTH) * 0.05
    weight = original + drawn(ROWS, WIDTH, seed=1) * 0.01
    rest = found.rest(weight, original)
    for at in ((0, 0), (7, 11), (ROWS - 1, WIDTH - 1)):
        moved = weight.clone()
        moved[at] = rest[at]
        before, after = (found.gradient(w - original)[at].abs() for w in (weight, moved))
        assert after < 1e-3 * before


def test_what_never_was_active_rests_where_it_is() -> None:
    found = form()
    found.inputs[:, 5], found.inputs[:, :, 5] = 0.0, 0.0
    original = drawn(ROWS, WIDTH)
    rest = found.rest(original + 0.1, original)
    assert rest.isfinite().all()
    assert torch.equal(rest[:, 5], (original + 0.1)[:, 5])


def held(start: QTensor, original: Tensor, found: Form) -> tuple[Places, Hold]:
    rest = found.rest(decode(start), original)
    places = Places(start, rest, "cpu")
    tensors = Tensors({"w": start}, {"w": places})
    return places, Hold({"w": found}, tensors, lambda _: encode(original, SCHEMES["f32"]))


def walked(places: Places, hold: Hold, found: Form, original: Tensor) -> list[float]:
    """The cost before and after 150 steps by nothing but what holds."""
    optimizer = AdamW(parameters={"w": places.parameters["place"]})
    costs: list[float] = []
    for step in range(150):
        costs.append(found.cost(places.weight().detach() - original))
        for leaf in places.parameters.values():
            leaf.grad = None
        hold.pull()
        optimizer.step(step, Rates().held)
    return [costs[0], found.cost(places.weight().detach() - original)]


def test_places_do_not_leave_the_best_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the form alone they make YAQA's rounding better. Without the curvature of their own they
    cross though it does not pay, and make it worse."""
    original, found = drawn(ROWS, WIDTH) * 0.05, form()
    start = solve(original, found.inputs[0], found.outputs[0], Q4_0)
    before, after = walked(*held(start, original, found), found, original)
    assert after < before
    monkeypatch.setattr(Form, "diagonal", torch.zeros(1, ROWS, WIDTH))
    places = Places(start, original, "cpu")
    tensors = Tensors({"w": start}, {"w": places})
    hold = Hold({"w": found}, tensors, lambda _: encode(original, SCHEMES["f32"]))
    before, after = walked(places, hold, found, original)
    assert after > 1.1 * before


def test_half_way_a_place_feels_what_the_crossing_brings() -> None:
    """On both sides of the middle between two integers the gradient is one, that of the change."""
    original, found = drawn(ROWS, WIDTH) * 0.05, form()
    places, hold = held(encode(original, Q4_0), original, found)
    place, at = places.parameters["place"], (7, 0, 11)
    felt, costs = [], []
    for side in (0.4999, 0.5001):
        with torch.no_grad():
            place[at] = 2 + side
        place.grad = places.parameters["step"].grad = None
        hold.pull()
        assert place.grad is not None
        felt.append(float(place.grad[at]))
        costs.append(found.cost(places.weight().detach() - original))
    # What the form and the loss bring together, of which here is the form alone.
    own = (
        float(found.diagonal.view_as(original)[7, 11]) * float(places.parameters["step"][7, 0]) ** 2
    )
    brought = fisher.FORM * (costs[1] - costs[0])
    assert felt[0] == pytest.approx(brought + fisher.OWN * own / 2, rel=1e-2)
    assert felt[1] == pytest.approx(brought - fisher.OWN * own / 2, rel=1e-2)


def test_a_pull_moves_nothing() -> None:
    original, found = drawn(ROWS, WIDTH) * 0.05, form()
    places, hold = held(encode(original, Q4_0), original, found)
    before = {name: leaf.detach().clone() for name, leaf in places.parameters.items()}
    hold.pull()
    for name, leaf in places.parameters.items():
        assert torch.equal(leaf.detach(), before[name])
        assert leaf.grad is not None and leaf.grad.ne(0).any()


def matrices(model: MemorySource) -> list[str]:
    return [
        t.name for t in model.spec.tensors() if t.name.startswith("layers.") and len(t.shape) > 1
    ]


def made(model: MemorySource, folder: Path, **job: int) -> Gathered:
    names = [name for name in matrices(model) if "router" not in name]
    return gathered(model, names, calibration().windows, folder, job=job)


@pytest.mark.parametrize("name", ["llama", "gemma4-experts"])
def test_a_stopped_gathering_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = source(name)
    whole = made(model, tmp_path / "whole").load()
    for key, found in whole.items():
        *stack, rows, width = model.weights[key].shape
        assert found.inputs.shape == (stack[0] if stack else 1, width, width)
        assert found.outputs.shape == (stack[0] if stack else 1, rows, rows)

    def stop(self: object, layer: str, found: object) -> None:
        if layer == "layers.0":
            raise KeyboardInterrupt
        keep(self, layer, found)  # type: ignore

    keep = Gathered.save
    with monkeypatch.context() as patched:
        patched.setattr(Gathered, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            made(model, tmp_path / "work")
    assert (tmp_path / "work" / "layers.1.npz").exists()
    for key, found in made(model, tmp_path / "work").load().items():
        assert torch.equal(found.inputs, whole[key].inputs)
        assert torch.equal(found.outputs, whole[key].outputs)


def test_what_was_gathered_is_read_and_another_job_s_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = source("llama")
    made(model, tmp_path)
    monkeypatch.setattr(fisher, "Walk", None)
    made(model, tmp_path).load()
    with pytest.raises(TypeError):
        made(model, tmp_path, other=1)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model = source("llama")
    found = made(model, tmp_path)
    fisher.save(tmp_path / "layers.0.npz", {"w": torch.zeros(2)}, {})
    with pytest.raises(IntegrityError, match="other tensors"):
        found.load()


def test_forms_foretell_the_divergence(tiny_gemma4: Path, tmp_path: Path) -> None:
    """A small error in one matrix: the measured KL beside the form's."""
    model = read(tiny_gemma4)
    windows = np.random.default_rng(0).integers(0, model.spec.vocab, (32, 64)).tolist()
    names = ["layers.0.mlp.gate.weight", "layers.3.attn.q.weight", "layers.5.mlp.down.weight"]
    forms = gathered(model, names, windows, tmp_path, job={}).load()
    stored = {t.name: model.tensor(t.name) for t in model.spec.tensors()}

    def states(tensors: dict[str, QTensor]) -> tuple[Tensor, Tensor]:
        student = Student(model.spec, Tensors(tensors, {}), TrainingOps(), again=False)
        return student.states(windows)[0], decode(stored[model.spec.head_name])

    cap = model.spec.logit_softcap
    with torch.no_grad():
        wanted, head = states(stored)
        z = wanted @ head.t()
        logits = z if cap is None else (z / cap).tanh() * cap
        for name in names:
            weight = decode(stored[name])
            errors = drawn(*weight.shape) * 0.05 * weight.square().mean().sqrt()
            other = {**stored, name: encode(weight + errors, SCHEMES["f32"])}
            ours, _ = states(other)
            kl = divergence(
                ours, head, lambda i, j: logits[i:j], torch.ones(len(ours)), softcap=cap
            )
            assert forms[name].cost(errors) == pytest.approx(float(kl), rel=0.35), name


def test_only_full_begins_at_rest() -> None:
    original, found = drawn(ROWS, WIDTH) * 0.05, form()
    start = encode(original, Q4_0)
    given = encode(original, SCHEMES["f32"])
    trainer = Trainer(mode="full")
    plain = trainer.tensors(lambda _: given, {"w": start}).parameters["w.place"]
    resting = trainer.tensors(lambda _: given, {"w": start}, {"w": found}).parameters["w.place"]
    assert torch.equal(plain.round(), resting.round())
    assert (plain - resting).abs().max() > 0.1
