"""A layer at a time: every weight is solved for the inputs that the finished model will give it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import CONFIGS, MemorySource, oracle, source_of

from halfbyte.errors import DoesNotFitError, IntegrityError, InvalidInputError
from halfbyte.formats.checkpoint import Source
from halfbyte.kernels.contract import Rows, Span
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer import calibrated, quantization
from halfbyte.quantizer.block import BORROWED
from halfbyte.quantizer.calibrate import Calibration, Sampling
from halfbyte.quantizer.curvature import damped
from halfbyte.quantizer.ends import DAMPING
from halfbyte.quantizer.methods import solve
from halfbyte.quantizer.moment import STRIPE, SecondMoment
from halfbyte.quantizer.observed import ObservedOps
from halfbyte.quantizer.quantization import Quantization
from halfbyte.quantizer.stages import Stages
from halfbyte.specs import Recipe, Scheme, SolveMethod, recipe_of

SAMPLES, WINDOW = 6, 48
# Of a model of two layers, the parts before the last: forward, and back.
ORDERS: dict[SolveMethod, Sequence[str]] = {
    "gptq": ("embed", "layers.0", "layers.1"),
    "yaqa": ("embed", "layers.1", "layers.0"),
}
FOUR_BITS = Recipe(name="four", rules=(("*", "q4_0"),))


def calibration(vocab: int = 128) -> Calibration:
    ids = np.random.default_rng(3).integers(0, vocab, (SAMPLES, WINDOW)).tolist()
    return Calibration(windows=ids, files={}, sampling=Sampling(samples=SAMPLES, window=WINDOW))


def source(name: str) -> MemorySource:
    return source_of(oracle(CONFIGS[name]), CONFIGS[name])


def quantized(
    original: MemorySource,
    folder: Path,
    *,
    recipe: Recipe = FOUR_BITS,
    method: SolveMethod = "gptq",
    in_memory: int = 1 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    schemes = {t.name: recipe.scheme_for(t.name, t.shape) for t in original.spec.tensors()}
    asked = Quantization(
        source=original,
        schemes=schemes,
        method=method,
        calibration=calibration(),
        stages=Stages(folder, spec=original.spec, schemes=schemes, job={"method": method}),
        in_memory=in_memory,
    )
    return calibrated.quantized(asked, progress)


def stored(made: Source) -> dict[str, bytes]:
    return {name: q.data.tobytes() for name, q in made.tensors()}


class Listening(ObservedOps):
    """Sums up x x^T of the inputs of every weight and expert, in a whole forward."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[tuple[int, int | None], tuple[torch.Tensor, int]] = {}

    def product(self, x, weight, expert=None):  # type: ignore[no-untyped-def]
        total, count = self.heard.get((id(weight), expert), (torch.zeros(1), 0))
        self.heard[id(weight), expert] = total + x.T @ x, count + len(x)
        return super().product(x, weight, expert)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3-biases", "gemma3", "gemma4-unified", "gemma4-everything"]
)
def test_every_weight_is_solved_for_the_inputs_it_will_have(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hessians that were gathered on the way are those of the finished model, run whole."""
    asked: dict[str, list[torch.Tensor]] = {}

    def listen(name, weight, hessian, *rest, **more):  # type: ignore[no-untyped-def]
        asked.setdefault(name, []).append(hessian)
        return solve(name, weight, hessian, *rest, **more)

    monkeypatch.setattr(quantization, "solve", listen)
    made = quantized(source(name), tmp_path / "work")
    ops = Listening()
    decoder = load(made, ops)
    for window in calibration().windows:
        rows = Rows(token_ids=window, spans=[Span(start=0, count=WINDOW, pages=(), ring=0)])
        own = [ScratchKV() for _ in made.spec.layers]
        caches = [
            own[i if layer.kv_source is None else layer.kv_source]
            for i, layer in enumerate(made.spec.layers)
        ]
        with torch.no_grad():
            decoder.logits(decoder.states(rows, caches))
    packed = {
        f"layers.{i}.{part}.weight": linear.weight
        for i, layer in enumerate(decoder.weights.layers)
        for part, linear in (("attn.q", layer.q), ("attn.o", layer.o), ("attn.v", layer.v),
                             ("mlp.up", layer.up), ("mlp.down", layer.down))
        if linear is not None
    }  # fmt: skip
    if not made.spec.tied_head:
        packed["head.weight"] = decoder.weights.head
    for key, weight in packed.items():
        total, count = ops.heard[id(weight), None]
        mean = damped(total / count, DAMPING) if key == "head.weight" else total / count
        torch.testing.assert_close(asked[key][0], mean, rtol=2e-3, atol=1e-4)
    for i, layer in enumerate(decoder.weights.layers):
        if layer.mixture is None:
            continue
        weight, found = layer.mixture.experts.down, asked[f"layers.{i}.experts.down.weight"]
        heard = [ops.heard.get((id(weight), e), (torch.zeros(1), 0)) for e in range(len(found))]
        mean = sum(total for total, _ in heard) / sum(count for _, count in heard)
        for hessian, (total, count) in zip(found, heard, strict=True):
            expected = (total + BORROWED * mean) / (count + BORROWED)
            torch.testing.assert_close(hessian, expected, rtol=2e-3, atol=1e-4)


def test_nothing_is_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a dense layer every product is made once for a batch: what was found stays known."""
    made: list[tuple[int, ...]] = []
    plain = ReferenceOps.product

    def product(self, x, weight, expert=None):  # type: ignore[no-untyped-def]
        made.append(weight.stored.shape)
        return plain(self, x, weight, expert)

    monkeypatch.setattr(ReferenceOps, "product", product)
    original = source("llama")
    recipe = Recipe(name="layers", rules=(("embed.weight", "f32"), ("*", "q4_0")))
    quantized(original, tmp_path / "work", recipe=recipe)
    shapes = [t.shape for t in original.spec.tensors() if t.name.startswith("layers.")]
    assert sorted(made) == sorted(shape for shape in shapes if len(shape) > 1)


@pytest.mark.parametrize("width", [STRIPE // 2, 2 * STRIPE + 96])
def test_a_second_moment_is_summed_by_halves(width: int) -> None:
    moment, x = SecondMoment(width, "cpu"), torch.randn(96, width)
    for part in x.split(40):
        moment.add(part)
        torch.testing.assert_close(moment.total, moment.total.T, rtol=0, atol=0)
    torch.testing.assert_close(moment.mean, x.T @ x / 96, rtol=1e-4, atol=1e-5)


def test_everything_is_stored_as_the_recipe_says(tmp_path: Path) -> None:
    original, recipe = source("gemma4-everything"), recipe_of("q4_0")
    made = quantized(original, tmp_path / "work", recipe=recipe, method="search")
    names = [tensor.name for tensor in original.spec.tensors()]
    assert [name for name, _ in made.tensors()] == names
    for name, q in made.tensors():
        assert q.scheme == recipe.scheme_for(name, q.shape)
        kept = original.weights[name]
        error = (decode(q) - kept).norm() / kept.norm()
        assert error < (0.12 if q.scheme.block > 1 else 2**-11), name


@pytest.mark.parametrize("method", ORDERS)
def test_states_on_the_disk_give_the_same_bytes(method: SolveMethod, tmp_path: Path) -> None:
    original = source("gemma4-per-layer")
    inside = stored(quantized(original, tmp_path / "a", method=method))
    outside = stored(quantized(original, tmp_path / "b", method=method, in_memory=0))
    assert inside == outside


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("method", ORDERS)
def test_a_stopped_job_goes_on_and_ends_in_the_same_bytes(
    method: SolveMethod, tmp_path: Path
) -> None:
    """Stopped after every single part, it is finished in the end, and each part was made once."""
    original = source("llama-odd-width")
    whole = stored(quantized(original, tmp_path / "whole", method=method))
    parts = [tmp_path / "work" / f"{part}.npz" for part in ORDERS[method]]

    def kill(done: int, total: int) -> None:
        if sum(part.exists() for part in parts) > len(made):
            raise Killed

    made: dict[Path, int] = {}
    for part in parts:
        with pytest.raises(Killed):
            quantized(original, tmp_path / "work", method=method, progress=kill)
        assert all(known.stat().st_mtime_ns == when for known, when in made.items())
        made[part] = part.stat().st_mtime_ns
    assert stored(quantized(original, tmp_path / "work", method=method)) == whole


def test_another_job_does_not_take_up_the_folder(tmp_path: Path) -> None:
    original = source("llama")
    stored(quantized(original, tmp_path / "work", method="search"))
    assert stored(quantized(original, tmp_path / "work")) == stored(
        quantized(original, tmp_path / "clean")
    )


@pytest.mark.parametrize("method", ORDERS)
def test_a_full_disk_loses_nothing(
    method: SolveMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = source("llama")
    whole = stored(quantized(original, tmp_path / "whole", method=method))
    write, writes = np.savez, iter(range(9))

    def full(file: object, **arrays: np.ndarray) -> None:
        if next(writes) == len(ORDERS[method]) - 1:
            raise OSError(28, "No space left on device")
        write(file, **arrays)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DoesNotFitError, match="disk became full"):
        quantized(original, tmp_path / "work", method=method)
    found = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert found == sorted([*(f"{part}.npz" for part in ORDERS[method][:-1]), "job.json"])
    assert stored(quantized(original, tmp_path / "work", method=method)) == whole


@pytest.mark.parametrize("method", ORDERS)
def test_activations_that_are_not_numbers_name_the_layer(
    method: SolveMethod, tmp_path: Path
) -> None:
    original = source("llama")
    original.weights["layers.1.mlp.up.weight"].mul_(1e20)
    original.weights["layers.1.mlp.gate.weight"].mul_(1e20)
    with pytest.raises(IntegrityError, match=r"layers\.1: activations are NaN"):
        quantized(original, tmp_path / "work", method=method)


def test_a_hessian_that_is_no_number_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name, weight, hessian, *rest, **more):  # type: ignore[no-untyped-def]
        return solve(name, weight, hessian * float("nan"), *rest, **more)

    monkeypatch.setattr(quantization, "solve", broken)
    with pytest.raises(InvalidInputError, match=r"embed\.weight: .*Hessian"):
        quantized(source("llama"), tmp_path / "work")


def test_what_is_on_the_grid_already_stays(tmp_path: Path) -> None:
    original = source("llama")
    first = quantized(original, tmp_path / "first")

    class Mixed:
        spec, assets = original.spec, None

        @property
        def schemes(self) -> dict[str, Scheme]:
            return {name: self.tensor(name).scheme for name in original.schemes}

        def tensor(self, name: str) -> QTensor:
            return (first if ".attn." in name else original).tensor(name)

        def tensors(self):  # type: ignore[no-untyped-def]
            return ((name, self.tensor(name)) for name in self.schemes)

    again = quantized(Mixed(), tmp_path / "again")  # type: ignore[arg-type]
    for name, q in again.tensors():
        if ".attn." in name:
            assert q.data.tobytes() == first.tensor(name).data.tobytes()
