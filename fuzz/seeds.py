"""Make the seeds of the corpus: small, valid, and with something of everything.

`python fuzz/seeds.py` writes them again, the same bytes each time; findings stay as they are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from targets.answer_stream import LETTERS, MARKS, models

from halfbyte.families import spec_of
from halfbyte.formats import gguf_writer, safetensors
from halfbyte.formats.checkpoint import write_gguf
from halfbyte.numerics import nf4
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, ModelSpec, Scheme
from halfbyte.text.assets import TextAssets, assets_from_metadata

CORPUS = Path(__file__).parent / "corpus"
CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
VOCABULARIES: dict[str, dict[str, Any]] = {
    "llama": {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "\u2581a", "aa"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1],
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": TEMPLATE,
        "general.sampling.temp": 0.5,
    },
    "gpt2": {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "H", "e", "l", "o", "He", "ll", "\u0120", "<x>"],
        "tokenizer.ggml.merges": ["H e", "l l"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1, 1, 4],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    },
    "gemma4": {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": [
            "<pad>",
            "<bos>",
            "<unk>",
            "<0x41>",
            "\u2581",
            "l",
            "ll",
            "<turn|>",
        ],
        "tokenizer.ggml.merges": ["l l"],
        "tokenizer.ggml.token_type": [3, 3, 2, 6, 1, 1, 1, 3],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.suppress_tokens": [0, 2],
    },
}
TEMPLATES = {
    "chatml": "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m.content | trim }}"
    "<|im_end|>\n{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "tools": "{{ bos_token }}{%- if tools is defined and tools %}{% for t in tools %}"
    "{{ t | tojson(indent=2) }}{% endfor %}{% endif %}{% for m in messages if m.tool_calls %}"
    "{% for c in m.tool_calls %}{{ c.function.name ~ c.function.arguments | tojson }}{% endfor %}"
    "{% else %}none{% endfor %}",
    "macros": "{% macro f(x, n=2) -%}{{ x | upper | replace('A', 'b') }}{{ caller() if caller }}"
    "{%- endmacro %}{% set ns = namespace(i=0) %}"
    "{% for m in messages | list %}{% set ns.i = ns.i + 1 %}"
    "{% if loop.first %}{% continue %}{% endif %}{{ f(m['content'][:3]) }}{{ ns.i ** 2 % 3 }}"
    "{% endfor %}{% call f('x') %}y{% endcall %}{{ strftime_now('%d %b') }}",
    "refuses": "{% if messages[0].role != 'user' %}{{ raise_exception('no ' * 3) }}{% endif %}"
    "{{ '%s %d' | format('a', 3) }}{{ 'x'.center(9) }}{{ range(4) | join(',') }}{# c #}",
    "generation": "{% generation %}{{ messages | map(attribute='role') | join }}{% endgeneration %}"
    "{% filter indent(2) %}a\nb{% endfilter %}"
    "{{ messages | selectattr('role', 'eq', 'user') | list }}",
}
CALLS = {
    "gemma4": 'call:weather{city:<|"|>Rome, {x}<|"|>,days:3,list:[1.5,true,null,{a:-2e3}]}',
    "hermes": '{"name": "weather", "arguments": {"city": "Rome", "days": [1, 2.5, null, true]}}',
    "string": '{"name": "f", "arguments": "{\\"a\\": {\\"b\\": []}}"}',
    "several": '[{"name": "f", "parameters": {}}, '
    '{"name": "g", "arguments": {"\u00e9": "\\u00e9"}}]',
    "behind": '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": 1e5}}',
}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A source of random bytes."""

    spec: ModelSpec
    schemes: Mapping[str, Scheme]
    assets: TextAssets | None

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for info in self.spec.tensors():
            yield info.name, stored(self.schemes[info.name], info.shape)

    def tensor(self, name: str) -> QTensor:
        return next(tensor for found, tensor in self.tensors() if found == name)


def stored(scheme: Scheme, shape: tuple[int, ...]) -> QTensor:
    """Bytes below 64: no number among them is infinite."""
    size = (prod(shape[:-1]), scheme.row_bytes(shape[-1]))
    data = np.random.default_rng(prod(shape)).integers(0, 64, size, dtype=np.uint8)
    return QTensor(scheme, shape, data)


def model(folder: Path, kind: str, vocabulary: str, scheme: str) -> None:
    metadata = VOCABULARIES[vocabulary]
    rows = {"vocab_size": len(metadata["tokenizer.ggml.tokens"]), "tie_word_embeddings": True}
    spec = spec_of({"model_type": kind, **CONFIG, **rows})
    schemes = {t.name: SCHEMES[scheme if len(t.shape) > 1 else "f32"] for t in spec.tensors()}
    source = Made(spec=spec, schemes=schemes, assets=assets_from_metadata(metadata))
    write_gguf(source, folder / f"{kind}-{scheme}.gguf")


def gguf_reader(folder: Path) -> None:
    model(folder, "llama", "llama", "q4_0")
    model(folder, "qwen2", "gpt2", "q8_0")
    tensors = {
        f"t.{name}": stored(scheme, (1, scheme.block))
        for name, scheme in SCHEMES.items()
        if scheme.ggml_type is not None
    }
    values = {
        "a": True,
        "b": -(2**40),
        "c": 1.5,
        "d": ["", "x"],
        "e": [1, -2],
        "f": [0.5],
        "g": [True],
    }
    layout = {name: (tensor.scheme, tensor.shape) for name, tensor in tensors.items()}
    gguf_writer.write(
        folder / "schemes.gguf", metadata=values, layout=layout, tensors=tensors.items()
    )


def safetensors_reader(folder: Path) -> None:
    shapes = {"f32": (3,), "f16": (2, 5), "bf16": (1, 2, 4)}
    tensors = {f"model.{name}": stored(SCHEMES[name], shape) for name, shape in shapes.items()}
    layout = {n: (safetensors.dtype_of(t.scheme), t.shape) for n, t in tensors.items()}
    data = ((name, tensor.data) for name, tensor in tensors.items())
    safetensors.write(folder / "floats", layout=layout, tensors=data)
    header = {
        "__metadata__": {"format": "pt"},
        "ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "none": {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [8, 8]},
    }
    text = json.dumps(header).encode()
    (folder / "others").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


def packed() -> Iterator[tuple[str, dict[str, Any], dict[str, np.ndarray]]]:
    """A matrix in each layout: its settings, and its parts by their endings."""
    words = np.arange(32, dtype="<i4") * 0x01010101
    halves, eights = np.full((2, 8), 0.5, "<f2"), np.full((2, 1), 0x77777777, "<i4")
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    parts = {"qweight": words.repeat(2).reshape(8, 8), "qzeros": eights, "scales": halves}
    order = np.arange(64, dtype="<i4")
    yield "gptq", gptq, {**parts, "g_idx": order // 32}
    sorted_, zeros = {**gptq, "desc_act": True, "sym": False}, {**parts, "qzeros": eights * 0}
    yield "gptq-sorted", sorted_, {**zeros, "g_idx": order % 2}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    yield "awq", awq, {**parts, "qweight": words.repeat(2).reshape(64, 1)}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": {**weights, "symmetric": False}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    packed_ = {
        "weight_packed": words.repeat(2).reshape(8, 8),
        "weight_scale": halves.T.copy(),
        "weight_shape": np.array([8, 64], "<i8"),
        "weight_zero_point": eights.T.copy(),
    }
    yield "compressed", {**settings, "config_groups": {"group_0": group}}, packed_
    bnb = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    rows = {"weight": np.arange(64, dtype="i1").reshape(8, 8), "SCB": np.ones(8, "<f4")}
    yield "int8", bnb, {**rows, "weight_format": np.zeros((), "u1")}
    for name, nested in (("nf4", True), ("nf4-single", False)):
        yield name, *_nf4(nested)


def _nf4(nested: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": [2, 64]}
    parts: dict[str, np.ndarray] = {
        "weight": np.arange(64, dtype="u1").reshape(64, 1),
        "weight.quant_map": nf4.levels().numpy(),
        "weight.absmax": np.ones(2, "<f4"),
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        parts["weight.absmax"] = np.ones(2, "u1")
        parts["weight.nested_absmax"] = np.ones(1, "<f4")
        parts["weight.nested_quant_map"] = nf4.dynamic_levels().numpy()
    text = np.frombuffer(json.dumps(state).encode(), "u1")
    parts["weight.quant_state.bitsandbytes__nf4"] = text
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return {**settings, "bnb_4bit_use_double_quant": nested}, parts


def packed_reader(folder: Path) -> None:
    types = {np.dtype(kind): name for name, kind in safetensors.NUMBERS.items() if name != "BF16"}
    for name, settings, parts in packed():
        named = {f"m.{ending}": part for ending, part in parts.items()}
        layout = {key: (types[part.dtype], part.shape) for key, part in named.items()}
        with TemporaryDirectory() as place:
            safetensors.write(Path(place) / "x", layout=layout, tensors=named.items())
            weights = (Path(place) / "x").read_bytes()
        (folder / name).write_bytes(json.dumps(settings).encode() + b"\0" + weights)


def chat_template(folder: Path) -> None:
    for name, template in TEMPLATES.items():
        (folder / name).write_text(template, encoding="utf-8")


def tool_calls(folder: Path) -> None:
    for name, call in CALLS.items():
        (folder / name).write_text(call, encoding="utf-8")


def answer_stream(folder: Path) -> None:
    """What is said, a thought, and a call between the marks of each model."""
    codes = {mark: bytes([len(LETTERS) + index]) for index, mark in enumerate(MARKS)}
    for index, (tokenizer, grammar) in enumerate(models()):
        thoughts, dialect = grammar.thoughts, grammar.dialect
        if thoughts is None or dialect is None:
            continue
        call = dialect.opens + CALLS.get(dialect.name, CALLS["hermes"]) + (dialect.closes or "")
        data = f"Hm. {thoughts.opens}\nWell{thoughts.closes} {call}\n".encode()
        for mark, code in codes.items() if tokenizer.token_id(MARKS[0]) else ():
            data = data.replace(mark.encode(), code)
        first = index + len(models()) * (128 // len(models()) + 1)
        (folder / f"{dialect.name}-{index}").write_bytes(bytes([first]) + data)


def stream_decoder(folder: Path) -> None:
    ids = {"bytes": range(9, 265), "words": [0, 2, 4, 5, 3, 7, 8, 1, 2, 2, 6], "\u00e9": [204, 178]}
    for name, values in ids.items():
        (folder / name.encode().hex()).write_bytes(b"".join(struct.pack("<H", i) for i in values))


def tokenizer_metadata(folder: Path) -> None:
    for name, metadata in VOCABULARIES.items():
        (folder / name).write_text(json.dumps(metadata), encoding="utf-8")


def tokenizer_json(folder: Path) -> None:
    added = [{"id": 3, "content": "<s>", "special": True}, {"id": 4, "content": "<x>"}]
    level = {"type": "ByteLevel", "add_prefix_space": False}
    model = {"type": "BPE", "vocab": {"H": 0, "e": 1, "He": 2}, "merges": ["H e"]}
    spaced = model | {"byte_fallback": True, "unk_token": "H"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    documents = {
        "byte-level": {"added_tokens": added, "pre_tokenizer": level, "model": model},
        "spaced": {"added_tokens": added, "normalizer": replace, "model": spaced},
    }
    beside = ({"bos_token": "<s>", "chat_template": TEMPLATE}, {"eos_token_id": [3], "top_k": 5})
    for name, document in documents.items():
        parts = (document, *beside, {"vocab_size": 6})
        (folder / name).write_bytes(b"\0".join(json.dumps(part).encode() for part in parts))


def main() -> None:
    files = (gguf_reader, safetensors_reader, packed_reader, tokenizer_metadata, tokenizer_json)
    for make in (*files, chat_template, tool_calls, answer_stream, stream_decoder):
        folder = CORPUS / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)


if __name__ == "__main__":
    main()
