"""LoRA adapters as PEFT writes them: adapter_config.json beside adapter_model.safetensors.

The names of modules are Hugging Face's and are found through the family's table, under any prefix
the family's checkpoints have. Nothing is left out: half a pair, a module that this model has not, a
target without a tensor, a rank that the configuration does not say are errors. What belongs to
another modality, or to keys and values that a layer shares, has nothing to change in a text model
and is `unused`. Pickles are never opened.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from halfbyte.errors import IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.families import family_of
from halfbyte.formats.finite import check_finite
from halfbyte.formats.lora_config import CONFIG, MERGE, LoraConfig, read_config
from halfbyte.formats.safetensors import INDEX, SINGLE, SafetensorsFile, TensorInfo
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import LowRankSpec, ModelSpec, TensorSpec, linears

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = "lm_head"
PARTS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The adapter in a directory, whatever model it is for: its A and B by PEFT's module name."""

    config: LoraConfig
    file: SafetensorsFile
    pairs: Mapping[str, tuple[TensorInfo, TensorInfo]]

    @property
    def nbytes(self) -> int:
        """What its tensors take, as they are stored."""
        return sum(info.stop - info.start for pair in self.pairs.values() for info in pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter that fits a model: its updates, and the stored module of each, in forward order.

    The scales of the updates have the caller's in them. `unused` are modules with nothing to change
    in a text model.
    """

    stored: Stored
    updates: Mapping[str, LowRankSpec]
    unused: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """What the updates take, as they are stored."""
        return sum(
            update.bytes(self.stored.pairs[module][0].scheme)
            for module, update in self.updates.items()
        )

    def tensors(self, module: str) -> tuple[QTensor, QTensor]:
        """A and B of a module, checked to be finite."""
        a, b = (self._tensor(info) for info in self.stored.pairs[module])
        return a, b

    def _tensor(self, info: TensorInfo) -> QTensor:
        tensor = self.stored.file.tensor(info.name)
        check_finite(tensor, name=info.name)
        return tensor


def is_adapter(path: Path) -> bool:
    """A directory with an adapter and no model."""
    model = (path / SINGLE).exists() or (path / INDEX).exists()
    return (path / CONFIG).is_file() and not model


def read_stored(directory: Path) -> Stored:
    """The adapter in a directory, from headers. `IntegrityError` for half pairs and wrong shapes,
    `UnsupportedError` for what is not plain LoRA."""
    if not (directory / CONFIG).is_file():
        raise InvalidInputError(f"no adapter: it has no {CONFIG}", where=directory)
    config = read_config(directory)
    if not (directory / WEIGHTS).is_file():
        if (directory / "adapter_model.bin").exists():
            raise UnsupportedError(
                "only pickled weights, which can run code when opened",
                where=directory,
                hint="save the adapter as safetensors where that is safe",
            )
        raise IntegrityError(f"has no {WEIGHTS}", where=directory)
    file = SafetensorsFile(directory / WEIGHTS)
    modules = dict.fromkeys(_module_of(file, name) for name in file.infos)
    if not modules:
        raise IntegrityError("holds no tensors", where=file.path)
    pairs = {module: _pair(file, module, config) for module in modules}
    return Stored(config=config, file=file, pairs=pairs)


def _module_of(file: SafetensorsFile, name: str) -> str:
    for part in PARTS:
        if name.startswith(PREFIX) and name.endswith(part):
            return name.removeprefix(PREFIX).removesuffix(part)
    raise UnsupportedError(
        f"the tensor '{name[:120]}'",
        where=file.path,
        hint="an adapter here is pairs of lora_A.weight and lora_B.weight, of linear layers",
    )


def _pair(file: SafetensorsFile, module: str, config: LoraConfig) -> tuple[TensorInfo, TensorInfo]:
    found = [file.infos.get(f"{PREFIX}{module}{part}") for part in PARTS]
    a, b = found
    if a is None or b is None:
        missing = PARTS[0] if a is None else PARTS[1]
        raise IntegrityError(f"{module} has no {missing[1:]}", where=file.path)
    rank = config.rank_of(module)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise IntegrityError(
            f"{module} has A {list(a.shape)} and B {list(b.shape)}; its rank is {rank}",
            where=file.path,
        )
    if a.scheme != b.scheme:  # either raises for a type that cannot be read
        raise IntegrityError(f"{module} has A in {a.dtype} and B in {b.dtype}", where=file.path)
    return a, b


def split_scale(reference: str) -> tuple[Path, float]:
    """`PATH` or `PATH@SCALE` as a person writes it; without one the scale is 1."""
    before, at, after = reference.rpartition("@")
    whole = Path(reference).expanduser()
    if not at or whole.exists():
        return whole, 1.0
    try:
        return Path(before).expanduser(), float(after)
    except ValueError:
        return whole, 1.0


def open_adapter(reference: str, spec: ModelSpec) -> Adapter:
    """The adapter that `PATH` or `PATH@SCALE` means, for a model; as `read`."""
    path, scale = split_scale(reference)
    return read(path, spec, scale=scale)


def read(directory: Path, spec: ModelSpec, *, scale: float = 1.0) -> Adapter:
    """The adapter in a directory, for a model; `scale` multiplies all of it.

    Headers only. Raises what `read_stored` raises, and `IntegrityError` where it was made for
    another model.
    """
    if not isfinite(scale):
        raise InvalidInputError(f"the scale is {scale}", where=directory)
    stored = read_stored(directory)
    known = _modules(spec)
    placed = {module: known[module] for module in stored.pairs if module in known}
    rest = stored.pairs.keys() - placed.keys()
    unused = _others(rest, spec)
    _refuse_unexpected(stored, rest - unused)
    _refuse_missing(stored, known, placed)
    modules = {weight: module for module, weight in placed.items()}
    if len(modules) < len(placed):
        raise _misfit(stored, "a layer has two updates, under different names")
    updates = {
        modules[tensor.name]: _update(stored, modules[tensor.name], tensor, scale)
        for tensor in linears(spec)
        if tensor.name in modules
    }
    return Adapter(stored=stored, updates=updates, unused=tuple(sorted(unused)))


def _modules(spec: ModelSpec) -> dict[str, str]:
    """Hugging Face's name of a linear, under every prefix -> our name of its weight."""
    family = family_of(spec)
    names = family.names(spec)
    return {
        prefix + names[tensor.name].hf.removesuffix(".weight"): tensor.name
        for tensor in linears(spec)
        for prefix in family.prefixes
    }


def _others(modules: Collection[str], spec: ModelSpec) -> set[str]:
    """Those of another modality, or of keys and values that the layer takes from another."""
    shared, ignored = _modules(spec.unshared), family_of(spec).ignored
    return {name for name in modules if name in shared or name.startswith(ignored)}


def _refuse_unexpected(stored: Stored, modules: Collection[str]) -> None:
    for module in modules:
        if module.rpartition(".")[2] == HEAD:
            raise UnsupportedError("an update of the head", where=stored.file.path, hint=MERGE)
    if modules:
        raise _misfit(stored, f"this model has no {_some(modules)}")


def _refuse_missing(stored: Stored, known: Mapping[str, str], placed: Mapping[str, str]) -> None:
    expected = {weight for module, weight in known.items() if stored.config.covers(module)}
    missing = expected - set(placed.values())
    if missing:
        raise _misfit(stored, f"the targets include {_some(missing)}, and the file does not")
    extra = [module for module in placed if not stored.config.covers(module)]
    if stored.config.targets is not None and extra:
        raise _misfit(stored, f"{_some(extra)} is not among the targets")


def _update(stored: Stored, module: str, tensor: TensorSpec, scale: float) -> LowRankSpec:
    outputs, inputs = tensor.shape
    update = LowRankSpec(
        weight=tensor.name,
        inputs=inputs,
        outputs=outputs,
        rank=stored.config.rank_of(module),
        scale=scale * stored.config.scale_of(module),
    )
    shapes = tuple(info.shape for info in stored.pairs[module])
    if shapes != update.shapes:
        (_, width), (height, _) = shapes
        raise _misfit(stored, f"{module} is {height} x {width} in it, here {outputs} x {inputs}")
    return update


def _misfit(stored: Stored, what: str) -> IntegrityError:
    base = stored.config.base
    hint = None if base is None else f"it was made for '{base}'"
    return IntegrityError(f"does not fit: {what}", where=stored.file.path.parent, hint=hint)


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more
