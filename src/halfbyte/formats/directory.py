"""A source as a directory in Hugging Face's form: config.json, one safetensors file, its text.

Floats are stored as they are, four-bit groups as compressed-tensors' `pack-quantized` (W4A16), with
their very integers, scales and zero points; so Transformers and vLLM load it. config.json is the
original's, cut down to the text model, where there is one, else it is written from the spec; the
tokenizer likewise. Everything that the form cannot hold is refused before a byte is written.

What it is not: a converter; `held_exactly` says which schemes a source must have. Transformers
computes in config.json's `dtype` and casts scales to it: an fp16 scale is rounded by a bf16 model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from halfbyte.errors import UnsupportedError
from halfbyte.families import Name, config_of, family_of, spec_of
from halfbyte.formats import safetensors
from halfbyte.formats.atomic import atomic_directory
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.documents import read_json
from halfbyte.formats.packed.settings import FIELD
from halfbyte.formats.packed.writing import is_packable, layout_of, parts_of, settings_for
from halfbyte.formats.progress import Progress
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, ModelSpec, Scheme, TensorSpec
from halfbyte.text.files import files_of

CONFIG = "config.json"
PREFIX = "model."
HEAD = "lm_head.weight"
TABLES = ("embed.weight", "per_layer.embed.weight")
FLOATS = tuple(safetensors.DTYPES.values())
# What a tokenizer or a sampler reads.
TEXT_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json",
)  # fmt: skip
# Of a config.json that wraps a text model, what is said outside of it.
OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


def held_exactly(name: str, shape: tuple[int, ...], scheme: Scheme) -> Scheme:
    """The scheme in which a directory holds every value of a stored tensor.

    Raises `UnsupportedError`, naming the tensor, where there is none.
    """
    if scheme.name in FLOATS:
        return scheme
    target = SCHEMES["int4-g32-f16"] if scheme.name == "q4_0" else scheme
    reason = None
    if not is_packable(target):
        reason = f"is {scheme.name}; compressed-tensors holds int4 and uint4 groups, and floats"
    elif name in TABLES:
        reason = "is a table of embeddings; compressed-tensors packs linears, and no tables"
    elif len(shape) != 2:
        reason = "is a stack of experts; Transformers keeps those as floats"
    if reason is None:
        return target
    hint = 'quantize with --recipe int4-g32, or a recipe with "embed.weight" = "bf16"'
    raise UnsupportedError(reason, where=name, hint=hint)


def write_directory(
    source: Source, origin: Path, target: Path, *, progress: Progress | None = None
) -> None:
    """Write `target`, a new directory, whole or not at all. Peak: one tensor.

    `origin`: the checkpoint that the source comes from, whose config and text files are kept if it
    is a directory. Raises `UnsupportedError` as `held_exactly`, and where no config.json says what
    the spec does.
    """
    names = family_of(source.spec).names(source.spec)
    layout = {
        name: stored
        for tensor in source.spec.tensors()
        for name, stored in _layout(tensor, names, source.schemes[tensor.name]).items()
    }
    config = {**_config(source.spec, origin), **_quantization(source, names)}
    texts = {CONFIG: json.dumps(config, indent=2)}
    if not (origin / CONFIG).is_file() and source.assets is not None:
        texts |= files_of(source.assets)
    size = sum(safetensors.bytes_of(*stored) for stored in layout.values())
    with atomic_directory(target, size=size) as part:
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
        for file in _text_files(origin):
            shutil.copyfile(file, part / file.name)
        safetensors.write(
            part / safetensors.SINGLE,
            layout=layout,
            tensors=_tensors(source, names),
            progress=progress,
        )


def _layout(
    tensor: TensorSpec, names: Mapping[str, Name], scheme: Scheme
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Stored name -> type and shape, of the parts of one tensor."""
    assert held_exactly(tensor.name, tensor.shape, scheme) == scheme, tensor.name
    name = _stored_name(names[tensor.name])
    if scheme.name in FLOATS:
        return {name: (safetensors.dtype_of(scheme), tensor.shape)}
    module = name.removesuffix("weight")
    return {module + part: stored for part, stored in layout_of(scheme, tensor.shape).items()}


def _stored_name(name: Name) -> str:
    return name.hf if name.hf == HEAD else PREFIX + name.hf


def _tensors(source: Source, names: Mapping[str, Name]) -> Iterator[tuple[str, np.ndarray]]:
    for ours, q in source.tensors():
        name = names[ours]
        stored = _stored_name(name)
        if q.scheme.name in FLOATS:
            yield stored, _without(q, name.offset).data
        else:
            module = stored.removesuffix("weight")
            yield from ((module + part, array) for part, array in parts_of(q).items())


def _without(q: QTensor, offset: float) -> QTensor:
    """The numbers less what Hugging Face's lack, in the same type."""
    if not offset:
        return q
    from halfbyte.numerics.codec import decode, encode  # brings torch

    return encode(decode(q) - offset, q.scheme)


def _quantization(source: Source, names: Mapping[str, Name]) -> dict[str, Any]:
    """The `quantization_config`, if any tensor is packed."""
    modules = {
        _stored_name(names[tensor.name]).removesuffix(".weight"): source.schemes[tensor.name]
        for tensor in source.spec.tensors()
        if len(tensor.shape) == 2 and tensor.name not in TABLES
    }
    packed = {module: scheme for module, scheme in modules.items() if is_packable(scheme)}
    others = modules.keys() - packed.keys() | ({"lm_head"} - packed.keys())
    return {FIELD: settings_for(packed, others)} if packed else {}


def _config(spec: ModelSpec, origin: Path) -> dict[str, Any]:
    if not (origin / CONFIG).is_file():
        return {**config_of(spec), "dtype": "bfloat16"}
    config = _of_origin(origin)
    assert spec_of(config) == spec, f"the config.json of {origin} says another model than was read"
    return config


def _of_origin(origin: Path) -> dict[str, Any]:
    """The config.json of a directory, of its text model alone."""
    outer = read_json(origin / CONFIG)
    text = cast("dict[str, Any] | None", outer.get("text_config"))
    config = dict(outer)
    if text is not None:
        kept = {key: outer[key] for key in OUTER if key in outer}
        kind = text.get("model_type", f"{outer['model_type']}_text")
        config = {**kept, **text, "model_type": kind}
        config.setdefault("dtype", outer.get("dtype", outer.get("torch_dtype", "bfloat16")))
    for unwanted in (FIELD, "auto_map"):  # old settings, and code to be run
        config.pop(unwanted, None)
    classes = family_of(spec_of(config)).classes
    return {**config, "architectures": [classes[config["model_type"]]]}


def _text_files(origin: Path) -> list[Path]:
    return [origin / name for name in TEXT_FILES if (origin / name).is_file()]
