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
from typing import Any

import numpy as np
from targets.answer_stream import LETTERS, MARKS, models

from halfbyte.families import spec_of
from halfbyte.formats import gguf_writer, safetensors
from halfbyte.formats.checkpoint import write_gguf
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
    files = (gguf_reader, safetensors_reader, tokenizer_metadata, tokenizer_json)
    for make in (*files, chat_template, tool_calls, answer_stream, stream_decoder):
        folder = CORPUS / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)


if __name__ == "__main__":
    main()
