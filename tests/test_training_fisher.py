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
from halfbyte.training.fisher import FINAL, Form, Gathered, Hold, Known, Own, gathered
from halfbyte.training.grid import Places, Updates
from halfbyte.training.modes import Mode, Rates, Trainer
from halfbyte.training.ops import TrainingOps
from halfbyte.training.student import Student, Tensors

ROWS, WIDTH = 48, 128
PARTS = ("whole", "work")
Q4_0, Q8_0 = SCHEMES["q4_0"], SCHEMES["q8_0"]


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
    curvature = found.own.curvature.view_as(errors)
    assert float(curvature[at]) == pytest.approx(second, rel=1e-2)


def test_at_rest_a_weight_has_no_gradient() -> None:
    found, original = form(), drawn(ROWS, WIDTH) * 0.05
    weight = original + drawn(ROWS, WIDTH, seed=1) * 0.01
    rest = weight + found.shift(weight, original)
    for at in ((0, 0), (7, 11), (ROWS - 1, WIDTH - 1)):
        moved = weight.clone()
        moved[at] = rest[at]
        before, after = (found.gradient(w - original)[at].abs() for w in (weight, moved))
        assert after < 1e-3 * before


def test_what_never_was_active_rests_where_it_is() -> None:
    found = form()
    found.inputs[:, 5], found.inputs[:, :, 5] = 0.0, 0.0
    original = drawn(ROWS, WIDTH)
    shift = found.shift(original + 0.1, original)
    assert shift.isfinite().all()
    assert shift[:, 5].eq(0).all()


def known(start: QTensor, original: Tensor, found: Form, *, whole: bool = True) -> Known:
    shift = found.shift(decode(start), original)
    return Known(own=found.own, shift=shift, form=found if whole else None)


def held(start: QTensor, original: Tensor, found: Form) -> tuple[Places, Hold]:
    it = known(start, original, found)
    places = Places(start, decode(start) + it.shift, "cpu")
    tensors = Tensors({"w": start}, {"w": places})
    return places, Hold({"w": it}, tensors, lambda _: encode(original, SCHEMES["f32"]))


def walked(places: Places, hold: Hold, found: Form, original: Tensor) -> list[float]:
    """The cost before and after 150 steps by nothing but what holds."""
    optimizer = AdamW(parameters={"w": places.parameters["place"]})
    costs: list[float] = []
    for step in range(150):
        costs.append(found.cost(places.weight().detach() - original))
        for leaf in places.parameters.values():
            leaf.grad = None
        hold.pull()
        optimizer.step(step, Rates().held_places)
    return [costs[0], found.cost(places.weight().detach() - original)]


def test_places_do_not_leave_the_best_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the form alone they make YAQA's rounding better. Without the curvature of their own they
    cross though it does not pay, and make it worse."""
    original, found = drawn(ROWS, WIDTH) * 0.05, form()
    start = solve(original, found.inputs[0], found.outputs[0], Q4_0)
    before, after = walked(*held(start, original, found), found, original)
    assert after < before
    places, hold = held(start, original, found)
    monkeypatch.setattr(Own, "curvature", torch.zeros(1, ROWS, WIDTH))
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
        float(found.own.curvature.view_as(original)[7, 11])
        * places.parameters["step"][7, 0].item() ** 2
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


def made(model: MemorySource, folder: Path, *, whole: bool = True, **job: int) -> Gathered:
    names = [
        name
        for name in matrices(model)
        if "router" not in name and model.weights[name].shape[-1] % Q8_0.block == 0
    ]
    start = {name: encode(model.weights[name], Q8_0) for name in names}
    return gathered(model, start, calibration().windows, folder, whole=whole, job=job)


@pytest.mark.parametrize("name", ["llama", "gemma4-experts"])
def test_a_stopped_gathering_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = source(name)
    whole = dict(made(model, tmp_path / "whole"))
    for key, found in whole.items():
        *stack, rows, width = model.weights[key].shape
        assert found.form is not None
        assert found.form.inputs.shape == (stack[0] if stack else 1, width, width)
        assert found.form.outputs.shape == (stack[0] if stack else 1, rows, rows)

    def stop(self: object, key: str, *found: object) -> None:
        if key == "layers.0.mlp.down.weight":
            raise KeyboardInterrupt
        keep(self, key, *found)  # type: ignore

    keep = Gathered.keep
    with monkeypatch.context() as patched:
        patched.setattr(Gathered, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            made(model, tmp_path / "work")
    assert (tmp_path / "work" / "layers.1.mlp.down.weight.npz").exists()
    again = made(model, tmp_path / "work")
    assert set(again) == set(whole)
    for place in ("layers.0", "layers.1", FINAL):
        metrics = [made(model, tmp_path / it).metric(place, model.spec.hidden) for it in PARTS]
        assert torch.equal(*metrics)
        assert torch.linalg.eigvalsh(metrics[0]).max() > 0
    for key, found in again.items():
        for ours, theirs in ((found.form, whole[key].form), (found.own, whole[key].own)):
            assert ours is not None and theirs is not None
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.outputs, theirs.outputs)
        assert torch.equal(found.shift, whole[key].shift)


@pytest.mark.parametrize("name", ["gemma3", "gemma4-experts", "gemma4-everything"])
def test_without_forms_the_same_is_known_of_every_weight(name: str, tmp_path: Path) -> None:
    model = source(name)
    whole, thin = (made(model, tmp_path / str(it), whole=it) for it in (True, False))
    for key, found in thin.items():
        assert found.form is None
        assert torch.equal(found.own.curvature, whole[key].own.curvature)
        assert torch.equal(found.shift, whole[key].shift)


def test_what_was_gathered_is_read_and_another_job_s_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = source("llama")
    made(model, tmp_path)
    monkeypatch.setattr(fisher, "Walk", None)
    dict(made(model, tmp_path))
    with pytest.raises(TypeError):
        made(model, tmp_path, other=1)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model = source("llama")
    found = made(model, tmp_path)
    name = "layers.0.mlp.down.weight"
    fisher.save(tmp_path / f"{name}.npz", {"w": torch.zeros(2)}, {})
    with pytest.raises(IntegrityError, match="other tensors"):
        found[name]


def test_forms_foretell_the_divergence(tiny_gemma4: Path, tmp_path: Path) -> None:
    """A small error in one matrix: the measured KL beside the form's."""
    model = read(tiny_gemma4)
    windows = np.random.default_rng(0).integers(0, model.spec.vocab, (32, 64)).tolist()
    names = ["layers.0.mlp.gate.weight", "layers.3.attn.q.weight", "layers.5.mlp.down.weight"]
    start = {name: encode(decode(model.tensor(name)), Q8_0) for name in names}
    found = gathered(model, start, windows, tmp_path, whole=True, job={})
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
            form = found[name].form
            assert form is not None
            assert form.cost(errors) == pytest.approx(float(kl), rel=0.35), name


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_places_begin_at_rest_with_the_integers_of_the_start(mode: Mode) -> None:
    """Of those that the form would not have cross at once, no gradient is left."""
    original, found = drawn(ROWS, WIDTH) * 0.05, form()
    start, given = encode(original, Q4_0), encode(original, SCHEMES["f32"])
    it = known(start, original, found, whole=mode == "full")
    tensors = Trainer(mode=mode).tensors(lambda _: given, {"w": start}, {"w": it})
    assert tensors.trained["w"].stored().data.tobytes() == start.data.tobytes()
    if mode == "full":
        place = tensors.parameters["w.place"].detach()
        steps = tensors.parameters["w.step"].detach()[..., None]
        off = place - place.round() - (it.shift.view(place.shape) / steps)
        assert off[place.sub(place.round()).abs() < 0.4].abs().max() < 1e-2


def test_a_pull_on_an_update_is_that_of_its_product() -> None:
    original, found = drawn(ROWS, WIDTH) * 0.05, form()
    start = encode(original, Q4_0)
    updates = Updates(start, original, "cpu", rank=4, seed=0)
    up, down = updates.parameters["up"], updates.parameters["down"]
    with torch.no_grad():
        up.add_(drawn(*up.shape, seed=2) * 0.1)
        place = updates.places(up, down)
    pull = drawn(ROWS, WIDTH, seed=4)
    updates.lean(found.own.curvature, pull)
    exact = Places(start, original, "cpu")
    with torch.no_grad():
        exact.parameters["place"].copy_(place)
    exact.lean(found.own.curvature, pull)
    at_place = exact.parameters["place"].grad
    assert at_place is not None and up.grad is not None and down.grad is not None
    product = at_place.view(ROWS, WIDTH)
    assert torch.allclose(up.grad, product @ down.detach().t(), rtol=1e-4, atol=1e-6)
    assert torch.allclose(down.grad, up.detach().t() @ product, rtol=1e-4, atol=1e-6)
    step, theirs = updates.parameters["step"].grad, exact.parameters["step"].grad
    assert step is not None and theirs is not None
    assert torch.allclose(step, theirs, rtol=1e-4, atol=1e-5)
