"""One walk back: every weight is rounded for its inputs and for what hangs on its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import CONFIGS, MemorySource, oracle, source_of

from halfbyte.errors import DoesNotFitError, IntegrityError
from halfbyte.kernels.contract import Rows
from halfbyte.numerics.codec import decode
from halfbyte.quantizer import tables
from halfbyte.quantizer.block import BORROWED, Block
from halfbyte.quantizer.calibrate import Calibration, Sampling
from halfbyte.quantizer.flow import Flow
from halfbyte.quantizer.gradients import Walk
from halfbyte.quantizer.methods import solve
from halfbyte.quantizer.observed import ObservedOps, Passed
from halfbyte.quantizer.stages import Finished, Stages
from halfbyte.quantizer.two_sided import TALL, TwoSided
from halfbyte.specs import Recipe, recipe_of

SAMPLES, WINDOW = 6, 48
FOUR_BITS = Recipe(name="four", rules=(("*", "q4_0"),))


def calibration() -> Calibration:
    ids = np.random.default_rng(3).integers(0, 128, (SAMPLES, WINDOW)).tolist()
    return Calibration(windows=ids, files={}, sampling=Sampling(samples=SAMPLES, window=WINDOW))


def source(name: str) -> MemorySource:
    return source_of(oracle(CONFIGS[name]), CONFIGS[name])


def quantized(
    original: MemorySource,
    folder: Path,
    *,
    recipe: Recipe = FOUR_BITS,
    in_memory: int = 1 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> Finished:
    schemes = {t.name: recipe.scheme_for(t.name, t.shape) for t in original.spec.tensors()}
    stages = Stages(folder, spec=original.spec, schemes=schemes, job={"method": "yaqa"})
    TwoSided(original, schemes, calibration(), stages, in_memory=in_memory).run(progress)
    return Finished(original, stages, schemes)


def stored(made: Finished) -> dict[str, bytes]:
    return {name: q.data.tobytes() for name, q in made.tensors()}


class Looking:
    """Keeps the inputs and gradients of every product."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int | None], tuple[torch.Tensor, torch.Tensor]] = {}

    def top(self, states: torch.Tensor, probabilities: torch.Tensor) -> None:
        pass

    def layer(
        self, block: Block, passed: Sequence[Passed], gradients: Sequence[torch.Tensor]
    ) -> None:
        names = {id(weight): name for name, weight in block.tensors.items()}
        for product, gradient in zip(passed, gradients, strict=True):
            key = names[id(product.weight)], product.expert
            self.seen[key] = product.input.detach(), gradient.clone()

    def left(self, block: Block) -> None:
        pass

    def entered(self, rows: Rows, gradient: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4-unified", "gemma4-experts"])
def test_both_sides_of_every_weight(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}

    def listen(name, weight, hessian, *rest, outputs=None):  # type: ignore[no-untyped-def]
        asked.setdefault(name, []).append((hessian, outputs))
        return solve(name, weight, hessian, *rest, outputs=outputs)

    monkeypatch.setattr(tables, "solve", listen)
    original = source(name)
    made = quantized(original, tmp_path / "work")
    looking, flow = Looking(), Flow(original.spec, calibration().windows, tmp_path)
    Walk(original, ObservedOps(), flow, seed=0).run(looking)
    names = {name for name, _ in looking.seen if name in asked}  # routers stay in f32
    assert names >= {f"layers.{i}.mlp.down.weight" for i in range(len(original.spec.layers))}
    for name in names:
        pairs = {e: pair for (key, e), pair in looking.seen.items() if key == name}
        totals, counts = [], []
        for e in range(len(asked[name])) if None not in pairs else [None]:
            x, g = pairs.get(e, (torch.zeros(0, 1), torch.zeros(0, 1)))
            counts.append(len(x))
            totals.append((x.T * g.square().sum(-1)) @ x if len(x) else torch.zeros(1))
        mean = sum(totals) / sum(counts)
        for (inputs, outputs), total, count in zip(asked[name], totals, counts, strict=True):
            expected = total / count if None in pairs else (
                (total + BORROWED * mean) / (count + BORROWED)
            )  # fmt: skip
            scale = float(expected.abs().max())
            torch.testing.assert_close(inputs / scale, expected / scale, rtol=1e-3, atol=1e-5)
            rows, width = original.weights[name].shape[-2:]
            assert (outputs is None) == (rows > TALL * width)
    x, g = looking.seen["layers.0.attn.o.weight", None]
    found = asked["layers.0.attn.o.weight"][0][1]
    assert found is not None
    expected = (g.T * x.square().sum(-1)) @ g / len(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    assert [name for name, _ in made.tensors()] == [t.name for t in original.spec.tensors()]


def test_everything_is_stored_as_the_recipe_says(tmp_path: Path) -> None:
    original, recipe = source("gemma4-everything"), recipe_of("q4_0")
    made = quantized(original, tmp_path / "work", recipe=recipe)
    for name, q in made.tensors():
        assert q.scheme == recipe.scheme_for(name, q.shape)
        kept = original.weights[name]
        error = (decode(q) - kept).norm() / kept.norm()
        assert error < (0.3 if q.scheme.block > 1 else 2**-11), name


def test_states_on_the_disk_give_the_same_bytes(tmp_path: Path) -> None:
    original = source("gemma4-per-layer")
    inside = stored(quantized(original, tmp_path / "a"))
    assert stored(quantized(original, tmp_path / "b", in_memory=0)) == inside


class Killed(BaseException):
    """Nothing catches it."""


def test_a_stopped_job_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Stopped after every layer, last to first; what was made stays as it is."""
    original = source("llama-odd-width")
    whole = stored(quantized(original, tmp_path / "whole"))
    parts = [tmp_path / "work" / f"{part}.npz" for part in ("layers.1", "layers.0")]

    def kill(done: int, total: int) -> None:
        if sum(part.exists() for part in parts) > len(made):
            raise Killed

    made: dict[Path, int] = {}
    for part in parts:
        with pytest.raises(Killed):
            quantized(original, tmp_path / "work", progress=kill)
        assert all(known.stat().st_mtime_ns == when for known, when in made.items())
        made[part] = part.stat().st_mtime_ns
    assert stored(quantized(original, tmp_path / "work")) == whole


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = source("llama")
    whole = stored(quantized(original, tmp_path / "whole"))
    write, writes = np.savez, iter(range(9))

    def full(file: object, **arrays: np.ndarray) -> None:
        if next(writes) == 1:
            raise OSError(28, "No space left on device")
        write(file, **arrays)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DoesNotFitError, match="disk became full"):
        quantized(original, tmp_path / "work")
    found = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert found == ["job.json", "layers.1.npz"]
    assert stored(quantized(original, tmp_path / "work")) == whole


def test_activations_that_are_not_numbers_name_the_layer(tmp_path: Path) -> None:
    original = source("llama")
    original.weights["layers.1.mlp.up.weight"].mul_(1e20)
    original.weights["layers.1.mlp.gate.weight"].mul_(1e20)
    with pytest.raises(IntegrityError, match=r"layers\.1: activations are NaN"):
        quantized(original, tmp_path / "work")
