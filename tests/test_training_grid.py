"""Weights on their grid: what trains is what ships, bit for bit; gradients; what is remembered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.numerics.codec import decode, encode, integers_of, store
from halfbyte.numerics.grids import GRIDS
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES
from halfbyte.training.adamw import AdamW
from halfbyte.training.grid import OnGrid, Places, Steps, Updates
from halfbyte.training.modes import Trainer
from halfbyte.training.small_adamw import SmallAdamW

WIDTH = 512


def given(scheme: str, rows: int = 6, seed: int = 0) -> tuple[torch.Tensor, QTensor]:
    """A weight, and how it is stored."""
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, WIDTH, generator=chance).mul_(0.05)
    weight[0, :32] = 0.0  # an empty group
    return weight, encode(weight, SCHEMES[scheme], method="search")


def made(kind: str, scheme: str) -> tuple[OnGrid, QTensor]:
    weight, q = given(scheme)
    if kind == "steps":
        return Steps(q, "cpu"), q
    if kind == "updates":
        return Updates(q, weight, "cpu", rank=4, seed=1), q
    kept = torch.bfloat16 if kind == "rough" else torch.float32
    return Places(q, weight, "cpu", kept=kept), q


@pytest.mark.parametrize("scheme", GRIDS)
def test_integers_are_read_as_they_were_stored(scheme: str) -> None:
    _, q = given(scheme)
    integers, scales = integers_of(q)
    assert store(integers.float(), scales, q.scheme).data.tobytes() == q.data.tobytes()
    meant = integers.float().unflatten(1, (scales.step.shape[1], -1)) * scales.step[..., None]
    assert torch.equal(meant.flatten(1), decode(q))


@pytest.mark.parametrize("kind", ["places", "steps", "updates", "rough"])
@pytest.mark.parametrize("scheme", ["q4_0", "q6_k", "q8_0", "int4-g128", "int4-g32", "uint4-g32"])
def test_training_begins_with_the_bytes_that_it_was_given(kind: str, scheme: str) -> None:
    if kind == "rough" and not scheme.endswith(("q4_0", "g32", "g128")):
        pytest.skip("bf16 is for four bits")
    weight, q = made(kind, scheme)
    assert torch.equal(weight.weight().detach(), decode(q))
    assert weight.stored().data.tobytes() == q.data.tobytes()


@pytest.mark.parametrize("kind", ["places", "steps", "updates", "rough"])
@pytest.mark.parametrize("scheme", ["q4_0", "q6_k", "int4-g128", "uint4-g32"])
def test_what_was_trained_is_what_ships(kind: str, scheme: str) -> None:
    """After steps of any size the forward is bit for bit what a runtime decodes."""
    if kind == "rough" and scheme == "q6_k":
        pytest.skip("bf16 is for four bits")
    weight, q = made(kind, scheme)
    chance = torch.Generator().manual_seed(2)
    for parameter in weight.parameters.values():
        noise = torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
        with torch.no_grad():
            parameter.add_(noise * parameter.abs().mean().clamp(min=0.05) * 0.5)
    stored = weight.stored()
    assert stored.data.tobytes() != q.data.tobytes()
    assert torch.equal(weight.weight().detach(), decode(stored))


def test_gradients_pass_straight_through_the_rounding() -> None:
    weight, q = made("places", "q4_0")
    integers, scales = integers_of(q)
    pull = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))
    weight.weight().backward(pull)
    place, step = weight.parameters["place"].grad, weight.parameters["step"].grad
    assert place is not None and step is not None
    groups = pull.unflatten(1, (-1, 32))
    assert torch.allclose(place, groups * scales.step[..., None], atol=1e-6)
    assert torch.allclose(step, (groups * integers.view_as(groups)).sum(-1), atol=1e-5)


def test_nothing_pulls_beyond_the_last_integer() -> None:
    weight, _ = made("places", "q4_0")
    place = weight.parameters["place"]
    with torch.no_grad():
        place[1, 0, :4] = torch.tensor([9.0, -9.5, 7.4, -8.4])
    weight.weight().sum().backward()
    assert place.grad is not None
    assert place.grad[1, 0, :2].eq(0).all()
    assert place.grad[1, 0, 2:4].ne(0).all()


def test_a_step_of_low_rank_is_the_step_of_its_product() -> None:
    """The gradients at the factors are those of a product that is added to the places."""
    weight, q = made("updates", "q4_0")
    up, down = weight.parameters["up"], weight.parameters["down"]
    pull = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))
    weight.weight().backward(pull)
    _, scales = integers_of(q)
    at_product = (pull.unflatten(1, (-1, 32)) * scales.step[..., None]).flatten(1)
    assert up.grad is not None and down.grad is not None
    assert torch.allclose(up.grad, at_product @ down.detach().t(), atol=1e-5)
    assert down.grad.eq(0).all()  # while up is zero


def test_an_update_knows_to_a_sixteenth_where_a_weight_lay() -> None:
    weight, q = given("q4_0")
    exact, rough = Places(q, weight, "cpu"), Updates(q, weight, "cpu", rank=2, seed=0)
    with torch.no_grad():
        places = rough.places(rough.parameters["up"], rough.parameters["down"])
    assert (places - exact.parameters["place"]).abs().max() <= 1 / 16


def test_modes_train_what_they_say() -> None:
    weight, q = given("q4_0")
    vector = encode(torch.ones(WIDTH), SCHEMES["f32"])
    stored = {"embed.weight": q, "layers.0.attn.q.weight": q, "norm.weight": vector}
    plain = encode(weight, SCHEMES["f32"])
    parts = {
        mode: set(Trainer(mode=mode).tensors(lambda _: plain, stored).parameters)
        for mode in ("full", "lora", "scales")
    }
    body = "layers.0.attn.q.weight"
    assert parts["scales"] == {"norm.weight.value", f"{body}.step"}
    assert parts["lora"] == parts["scales"] | {f"{body}.up", f"{body}.down"}
    assert parts["full"] == parts["scales"] | {
        f"{body}.place", "embed.weight.place", "embed.weight.step"
    }  # fmt: skip


# What is remembered in 8 bits.


def descent(kind: type[AdamW] | type[SmallAdamW], dtype: torch.dtype, rate: float) -> float:
    """The mean square distance to a target after 300 steps of a noisy quadratic."""
    chance = torch.Generator().manual_seed(0)
    target = torch.randn(3, 1000, generator=chance)
    place = torch.zeros(3, 1000, dtype=dtype).requires_grad_()
    optimizer = kind(parameters={"x": place})
    for step in range(300):
        noise = torch.randn(target.shape, generator=chance)
        place.grad = (place.detach().float() - target + 0.1 * noise).to(dtype)
        optimizer.step(step, rate)
    return float((place.detach().float() - target).square().mean())


def test_eight_bits_of_memory_are_enough() -> None:
    whole, small = (descent(kind, torch.float32, 0.02) for kind in (AdamW, SmallAdamW))
    assert small < 1.3 * whole + 1e-3


def test_rounding_by_chance_moves_what_rounding_to_nearest_leaves() -> None:
    """A rate far below what bf16 tells apart still arrives, on the average."""
    place = torch.ones(1 << 14, dtype=torch.bfloat16).requires_grad_()
    optimizer = SmallAdamW(parameters={"x": place}, eps=1e-12)
    for step in range(40):
        place.grad = torch.ones_like(place)
        optimizer.step(step, 1e-4)
    assert float(place.detach().float().mean()) == pytest.approx(1 - 40e-4, abs=4e-4)
    plain = torch.ones(4, dtype=torch.bfloat16)
    assert torch.equal(plain - 1e-4, plain)


def test_the_same_steps_give_the_same_bits() -> None:
    found = [descent(SmallAdamW, torch.bfloat16, 0.02) for _ in range(2)]
    assert found[0] == found[1]
    assert np.isfinite(found[0])
