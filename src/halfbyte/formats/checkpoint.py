"""A checkpoint as a stream of named tensors: `read` makes a `Source`, `write_gguf` takes any.

A source knows its spec, how each tensor is stored, and the text assets; it gives tensors under our
names, one at a time, as views of the mapped file. The peak of a walk through it is one tensor.
Foreign names come from the family's table and nowhere else: a tensor that is missing, unexpected or
of another shape is an error, so nothing is ever left out in silence.

Where a GGUF keeps the rows of q and k in rotated-pair order, they are moved as whole rows, exactly
in every scheme; where Hugging Face's norms lack an offset, it is added. Every tensor given is
finite (`finite`), or checked by whoever takes it. What it is not: a converter; a wrapper that
changes schemes is itself a `Source`, and is found in the quantizer.

What only directories, texts or writing need is imported when it is: a GGUF starts sooner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from halfbyte.errors import HalfbyteError, IntegrityError, InvalidInputError
from halfbyte.families import Family, Name, family_of, spec_of
from halfbyte.formats.finite import check_finite
from halfbyte.formats.gguf_parts import ROPE_FREQS, GGUFModel, part_paths
from halfbyte.formats.paired import to_halves, to_pairs
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import is_drafter_file
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, ModelSpec, Scheme

if TYPE_CHECKING:
    from halfbyte.text.assets import TextAssets

# general.file_type of llama.h, by the scheme of most tensors.
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k": 12,
    "q4_k": 15,
    "q5_k": 17,
    "q6_k": 18,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "bf16": 32,
}
# Where a tokenizer is, in a directory and in a GGUF.
TOKENIZER, TOKENS, MERGES = "tokenizer.json", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
# What the name of a tensor of another modality says, the first that does.
OTHER_PARTS = {"audio": "audio", "vision": "vision", "multi_modal": "vision", "visual": "vision"}
FROZEN = 1e30  # the stored divisor of a pair that does not rotate


@dataclass(frozen=True, slots=True)
class Pieces:
    """How large a tokenizer is, as far as headers say: `merges` None where it has scores instead;
    `parsed` is whether its strings came with the header."""

    tokens: int
    merges: int | None = None
    parsed: bool = False


class Source(Protocol):
    """A model as named tensors. `schemes` and `tensors` are in the order of `spec.tensors()`."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def schemes(self) -> Mapping[str, Scheme]: ...

    @property
    def assets(self) -> TextAssets | None: ...

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        """Every tensor once; the one given before may be dropped when the next is asked for."""
        ...

    def tensor(self, name: str) -> QTensor: ...


class Around:
    """What a source made of another has from it."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def spec(self) -> ModelSpec:
        return self._source.spec

    @property
    def assets(self) -> TextAssets | None:
        return self._source.assets


class Replaced(Around):
    """A source, some of whose tensors are others."""

    def __init__(self, source: Source, tensors: Mapping[str, QTensor]) -> None:
        super().__init__(source)
        self._others = tensors
        self.schemes = {
            name: tensors[name].scheme if name in tensors else scheme
            for name, scheme in source.schemes.items()
        }

    def tensor(self, name: str) -> QTensor:
        return self._others[name] if name in self._others else self._source.tensor(name)

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for tensor in self.spec.tensors():
            yield tensor.name, self.tensor(tensor.name)


class StoredTensor(Protocol):
    """What a header says of a tensor."""

    @property
    def scheme(self) -> Scheme: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class TensorFile(Protocol):
    """A safetensors or GGUF file."""

    @property
    def infos(self) -> Mapping[str, StoredTensor]: ...

    def tensor(self, name: str) -> QTensor: ...

    def release(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a tensor is. `paired_heads`: its rows are in rotated-pair order, by that many heads.

    `offset`: what the stored numbers of a vector lack; with it they are given as f32.
    """

    file: TensorFile
    name: str
    paired_heads: int | None = None
    offset: float = 0.0

    @property
    def stored(self) -> StoredTensor:
        return self.file.infos[self.name]

    @property
    def scheme(self) -> Scheme:
        return SCHEMES["f32"] if self.offset else self.stored.scheme


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The `Source` of files on disk. `unused_bytes` are what a text model has no use for, by name;
    `decoded`: which matrices are f32 here though they are quantized, and why; `pieces`: of the
    tokenizer, which is read when it is first asked for, None without one."""

    path: Path
    spec: ModelSpec
    entries: Mapping[str, Entry]
    unused_bytes: Mapping[str, int]
    load_assets: Callable[[], TextAssets | None]
    pieces: Pieces | None
    decoded: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        return self._schemes

    @property
    def unused(self) -> tuple[str, ...]:
        """The stored names a text model has no use for."""
        return tuple(self.unused_bytes)

    @property
    def left_out(self) -> Mapping[str, int]:
        """Bytes of what is stored for other modalities: "vision.weights", "audio.weights"."""
        sizes: Counter[str] = Counter()
        for name, size in self.unused_bytes.items():
            part = next((part for mark, part in OTHER_PARTS.items() if mark in name), None)
            if part is not None:
                sizes[f"{part}.weights"] += size
        return sizes

    @property
    def assets(self) -> TextAssets | None:
        """Read when first asked for: a large vocabulary takes a second."""
        return self._assets

    @cached_property
    def _schemes(self) -> Mapping[str, Scheme]:
        return {name: entry.scheme for name, entry in self.entries.items()}

    @cached_property
    def _assets(self) -> TextAssets | None:
        with _located(self.path):
            assets = self.load_assets()
            _check_rows(assets, self.spec.vocab)
            return assets

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        """Every tensor; its pages are given back when the next is asked for."""
        return self.tensors_for(())

    def tensors_for(self, checking: Collection[Scheme]) -> Iterator[tuple[str, QTensor]]:
        """As `tensors`, but matrices in these schemes are not read: who takes them checks them."""
        for name, entry in self.entries.items():
            checked = len(entry.stored.shape) > 1 and entry.stored.scheme in checking
            yield name, self._given(name, check=not checked)
            entry.file.release(entry.name)

    def tensor(self, name: str) -> QTensor:
        """One tensor, checked to be finite."""
        return self._given(name, check=True)

    def _given(self, name: str, *, check: bool) -> QTensor:
        entry = self.entries[name]
        tensor = entry.file.tensor(entry.name)
        if check:
            check_finite(tensor, name=name)
        if entry.offset:
            return _shifted(tensor, entry.offset)
        heads = entry.paired_heads
        return tensor if heads is None else to_halves(tensor, heads)


def _shifted(tensor: QTensor, offset: float) -> QTensor:
    """The numbers plus `offset`, in f32."""
    from halfbyte.numerics.codec import decode, encode  # brings torch, which headers do without

    return encode(decode(tensor) + offset, SCHEMES["f32"])


def read(path: Path) -> Checkpoint:
    """The checkpoint in a directory (config.json and safetensors, or one GGUF) or a .gguf file.

    Of a split GGUF, any part stands for the whole. Reads headers only. Raises `IntegrityError`
    for a damaged or incomplete checkpoint and `UnsupportedError` for a model or a tensor type that
    we do not run.
    """
    if not path.exists():
        raise InvalidInputError("does not exist", where=path)
    with _located(path):
        if path.is_file():
            return _read_gguf(path)
        if (path / "config.json").exists():
            return _read_directory(path)
        files = [file for file in path.glob("*.gguf") if not is_drafter_file(file)]
        found = {part_paths(file)[0] for file in files}
        if len(found) != 1:
            raise IntegrityError(f"has no config.json, and {len(found)} .gguf models")
        return _read_gguf(found.pop())


def _read_directory(path: Path) -> Checkpoint:
    from halfbyte.formats import safetensors
    from halfbyte.formats.documents import read_json
    from halfbyte.formats.packed import decoded, unpacked

    config = read_json(path / "config.json")
    spec = spec_of(config)
    files = unpacked(config, safetensors.open_directory(path))
    family = family_of(spec)
    names = family.names(spec)
    located = _locate({name.ours: name.hf for name in names.values()}, files, family.prefixes)
    rest = files.keys() - located.values()
    copies = {prefix + name.hf for name in _copies(family, spec) for prefix in family.prefixes}
    unused = {name for name in rest if name in copies or _is_other(name, family)}
    _refuse_unexpected(rest - unused)
    entries = {
        ours: Entry(file=files[stored], name=stored, offset=names[ours].offset)
        for ours, stored in located.items()
    }
    _check_shapes(spec, entries)
    return Checkpoint(
        path=path,
        spec=spec,
        entries=entries,
        unused_bytes={name: _stored_bytes(files[name], name) for name in sorted(unused)},
        load_assets=lambda: _assets_of_directory(path, spec.vocab),
        pieces=Pieces(spec.vocab) if (path / TOKENIZER).is_file() else None,
        decoded=decoded(files, located),
    )


def _read_gguf(path: Path) -> Checkpoint:
    model = GGUFModel(path)
    spec = spec_of(model.header())
    family = family_of(spec)
    names = family.names(spec)
    located = _locate({name.ours: name.gguf for name in names.values()}, model.places, ("",))
    rest = model.places.keys() - located.values() - {ROPE_FREQS}
    unused = rest & {name.gguf for name in _copies(family, spec)}
    _refuse_unexpected(rest - unused)
    entries = {
        ours: Entry(file=model.places[stored], name=stored, paired_heads=names[ours].paired_heads)
        for ours, stored in located.items()
    }
    _check_shapes(spec, entries)
    return Checkpoint(
        path=path,
        spec=spec,
        entries=entries,
        unused_bytes={name: _stored_bytes(model.places[name], name) for name in sorted(unused)},
        load_assets=lambda: _assets_of_metadata(model.metadata),
        pieces=_pieces(model.metadata),
    )


def _pieces(metadata: Mapping[str, Any]) -> Pieces | None:
    tokens, merges = metadata.get(TOKENS), metadata.get(MERGES)
    if not isinstance(tokens, list):
        return None
    return Pieces(len(tokens), len(merges) if isinstance(merges, list) else None, parsed=True)


def _stored_bytes(file: TensorFile, name: str) -> int:
    """What a tensor of any type takes in its file; of one that was packed, nothing is known."""
    info = file.infos[name]
    return getattr(info, "stop", 0) - getattr(info, "start", 0)


def _locate(
    names: Mapping[str, str], stored: Iterable[str], prefixes: tuple[str, ...]
) -> dict[str, str]:
    """Our name -> the stored one. The prefix is the one under which the first tensor is found.

    A head may stand outside of the prefix, under a shorter one.
    """
    stored = set(stored)
    first = next(iter(names.values()))
    found = [prefix for prefix in prefixes if prefix + first in stored]
    candidates = (*found[:1], *prefixes)
    located: dict[str, str] = {}
    missing: list[str] = []
    for ours, name in names.items():
        match = next((prefix + name for prefix in candidates if prefix + name in stored), None)
        if match is None:
            missing.append(name)
        else:
            located[ours] = match
    if missing:
        raise IntegrityError(f"{len(missing)} tensors are missing: {_some(missing)}")
    return located


def _copies(family: Family, spec: ModelSpec) -> list[Name]:
    """What a checkpoint may store though the model shares it: a tied head, keys and values."""
    own = family.names(spec)
    return [name for ours, name in family.names(spec.unshared).items() if ours not in own]


def _is_other(name: str, family: Family) -> bool:
    """A tensor of another modality, or a stored buffer."""
    return name.startswith(family.ignored) or name.endswith(family.ignored)


def _refuse_unexpected(names: Iterable[str]) -> None:
    unexpected = sorted(names)
    if unexpected:
        raise IntegrityError(
            f"{len(unexpected)} tensors are not part of this model: {_some(unexpected)}",
            hint="the config and the weights are of different models, or of a newer version",
        )


def _check_shapes(spec: ModelSpec, entries: Mapping[str, Entry]) -> None:
    for tensor in spec.tensors():
        stored = entries[tensor.name].stored
        if stored.shape != tensor.shape:
            raise IntegrityError(
                f"'{tensor.name}' has the shape {stored.shape} in the file and "
                f"{tensor.shape} in the model's description"
            )
        _ = stored.scheme  # raises for a type that cannot be read


def _assets_of_directory(path: Path, rows: int) -> TextAssets | None:
    from halfbyte.text.assets import assets_from_directory

    return assets_from_directory(path, num_rows=rows)


def _assets_of_metadata(metadata: Mapping[str, Any]) -> TextAssets | None:
    from halfbyte.text.assets import assets_from_metadata

    return assets_from_metadata(metadata)


def _check_rows(assets: TextAssets | None, rows: int) -> None:
    """More rows than tokens is padding; a token without a row could not be embedded."""
    tokens = 0 if assets is None else len(assets.vocabulary.tokens)
    if tokens > rows:
        raise IntegrityError(
            f"the tokenizer has {tokens} tokens and the embedding {rows} rows",
            hint="the tokenizer is another model's, or the embedding was not resized with it",
        )


def _some(names: list[str]) -> str:
    """Up to five of them."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


@contextmanager
def _located(path: Path) -> Generator[None]:
    """Errors from rooms that know no files say which file it was."""
    try:
        yield
    except HalfbyteError as error:
        if error.where is not None:
            raise
        raise type(error)(error.what, where=path, hint=error.hint) from error


def write_gguf(
    source: Source,
    path: Path,
    *,
    extra_metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a source as one GGUF that llama.cpp and `read` understand, whole or not at all.

    Matrices keep their scheme; vectors become f32, as llama.cpp wants them. The metadata is what
    the family says of the spec and the text assets of themselves; `extra_metadata` is put on top.
    Peak: one tensor.
    """
    from halfbyte.formats import gguf_writer

    names = family_of(source.spec).names(source.spec)
    divisors = _stored_divisors(source.spec)
    layout: dict[str, tuple[Scheme, tuple[int, ...]]] = {}
    if divisors is not None:
        layout[ROPE_FREQS] = divisors.scheme, divisors.shape
    for tensor in source.spec.tensors():
        vector = len(tensor.shape) == 1
        scheme = SCHEMES["f32"] if vector else source.schemes[tensor.name]
        layout[names[tensor.name].gguf] = scheme, tensor.shape
    gguf_writer.write(
        path,
        metadata={**_metadata(source, path.stem), **(extra_metadata or {})},
        layout=layout,
        tensors=_stored(source, names, divisors),
        progress=progress,
    )


def _stored(
    source: Source, names: Mapping[str, Name], divisors: QTensor | None
) -> Iterator[tuple[str, QTensor]]:
    """The tensors of the source as a GGUF has them."""
    from halfbyte.numerics.codec import convert  # brings torch, which reading does without

    if divisors is not None:
        yield ROPE_FREQS, divisors
    for ours, tensor in source.tensors():
        name = names[ours]
        if name.paired_heads is not None:
            tensor = to_pairs(tensor, name.paired_heads)
        yield name.gguf, convert(tensor, SCHEMES["f32"]) if len(tensor.shape) == 1 else tensor


def _metadata(source: Source, name: str) -> dict[str, Any]:
    spec = source.spec
    facts = family_of(spec).to_metadata(spec)
    # A model without text is one with no tokenizer, which llama.cpp wants said.
    none = {"tokenizer.ggml.model": "none", f"{spec.architecture}.vocab_size": spec.vocab}
    return {
        "general.architecture": spec.architecture,
        "general.name": name,
        **_file_type(source.schemes.values()),
        **{f"{spec.architecture}.{key}": value for key, value in facts.items()},
        **(none if source.assets is None else _stored_assets(source.assets)),
    }


def _stored_assets(assets: TextAssets) -> dict[str, Any]:
    from halfbyte.text.assets import assets_to_metadata

    return assets_to_metadata(assets)


def _file_type(schemes: Iterable[Scheme]) -> dict[str, int]:
    """llama.cpp's word for the scheme of most tensors, vectors aside."""
    counts = Counter(scheme for scheme in schemes if scheme.name != "f32")
    common = counts.most_common(1)[0][0] if counts else SCHEMES["f32"]
    quantized = any(scheme.block > 1 for scheme in counts)
    version = {"general.quantization_version": 2} if quantized else {}
    return {"general.file_type": FILE_TYPES[common.name], **version}


def _stored_divisors(spec: ModelSpec) -> QTensor | None:
    """`rope_freqs.weight`: the divisors of the full layers, unless the metadata can say them."""
    divisors = spec.layers[-1].attention.rope.divisors
    if divisors is None or "rope.scaling.type" in family_of(spec).to_metadata(spec):
        return None
    values = [FROZEN if divisor == inf else divisor for divisor in divisors]
    data = np.array([values], dtype="<f4").view(np.uint8)
    return QTensor(SCHEMES["f32"], (len(values),), data)
