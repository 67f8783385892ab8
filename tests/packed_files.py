"""Tiny checkpoints in the layouts of other packages, packed here word by word from what those
document; beside each matrix the weights that it means, scale * (q - zero) in f32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle import LLAMA, oracle
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from halfbyte.numerics import nf4

CONFIG = {**LLAMA, "hidden_size": 128, "intermediate_size": 256}
Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, np.ndarray]
Pack = Callable[[int, int, np.random.Generator], Packed]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A `quantization_config`, the packer of one matrix [rows, width], and its scheme here."""

    config: Mapping[str, Any]
    pack: Pack
    scheme: str


def words(values: np.ndarray, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """[n, m] below 16 -> int32 [n, m / 8]; place i of a word holds number order[i]."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % 8)))
    packed = np.zeros((len(padded), padded.shape[1] // 8), np.uint32)
    for place, number in enumerate(order):
        packed |= padded[:, number::8].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(packed.view(np.int32).copy())


def drawn(
    rows: int, width: int, groups: int, rng: np.random.Generator, *, zero: bool, dtype: torch.dtype
) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Integers in 0..15 [rows, width], scales and zeros [rows, groups]."""
    integers = rng.integers(0, 16, (rows, width))
    scales = torch.from_numpy(rng.uniform(0.002, 0.01, (rows, groups))).to(dtype)
    zeros = rng.integers(0, 16, (rows, groups)) if zero else np.full((rows, groups), 8)
    return integers, scales, zeros


def meant(
    integers: np.ndarray, scales: torch.Tensor, zeros: np.ndarray, group_of: np.ndarray
) -> np.ndarray:
    steps = scales.float().numpy()[:, group_of]
    return steps * (integers - zeros[:, group_of]).astype(np.float32)


def gptq(
    size: int, *, zero: bool = False, version: int = 1, sort: bool = False, bf16: bool = False
) -> Pack:
    def pack(rows: int, width: int, rng: np.random.Generator) -> Packed:
        length = width if size == -1 else size
        dtype = torch.bfloat16 if bf16 else torch.float16
        integers, scales, zeros = drawn(rows, width, width // length, rng, zero=zero, dtype=dtype)
        group_of = np.arange(width) // length
        if sort:
            group_of = rng.permutation(group_of)
        stored = words(zeros.T).numpy().view(np.uint32) - np.uint32(0x11111111 * (version == 1))
        tensors = {
            "qweight": words(integers).T.contiguous(),
            "qzeros": torch.from_numpy(stored.view(np.int32)),
            "scales": scales.T.contiguous(),
            "g_idx": torch.from_numpy(group_of.astype(np.int32)),
        }
        return tensors, meant(integers, scales, zeros, group_of)

    return pack


def awq(size: int) -> Pack:
    def pack(rows: int, width: int, rng: np.random.Generator) -> Packed:
        length = width if size == -1 else size
        integers, scales, zeros = drawn(
            rows, width, width // length, rng, zero=True, dtype=torch.float16
        )
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": words(integers.T, order),
            "qzeros": words(zeros.T, order),
            "scales": scales.T.contiguous(),
        }
        return tensors, meant(integers, scales, zeros, np.arange(width) // length)

    return pack


def compressed(
    size: int | None, *, zero: bool = False, dtype: torch.dtype = torch.bfloat16, sort: bool = False
) -> Pack:
    def pack(rows: int, width: int, rng: np.random.Generator) -> Packed:
        length = size or width
        integers, scales, zeros = drawn(rows, width, width // length, rng, zero=zero, dtype=dtype)
        group_of = np.arange(width) // length
        if sort:
            group_of = rng.permutation(group_of)
        tensors = {
            "weight_packed": words(integers),
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, width]),
        }
        if zero:
            tensors["weight_zero_point"] = words(zeros.T).T.contiguous()
        if sort:
            tensors["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
        return tensors, meant(integers, scales, zeros, group_of)

    return pack


def nf4_of(*, nested: bool) -> Pack:
    def pack(rows: int, width: int, rng: np.random.Generator) -> Packed:
        blocks = rows * width // 64
        numbers = rng.integers(0, 16, (rows * width // 2, 2))
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
        state["shape"] = [rows, width]
        tensors = {"weight": torch.from_numpy((numbers[:, :1] << 4 | numbers[:, 1:]).astype("u1"))}
        tensors["weight.quant_map"] = nf4.levels()
        if nested:
            codes = rng.integers(0, 256, blocks).astype("u1")
            spans = rng.uniform(0.001, 0.003, -(-blocks // 256)).astype("f4")
            offset = np.float32(0.025)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
            state["nested_offset"] = float(offset)
            tensors |= {
                "weight.absmax": torch.from_numpy(codes),
                "weight.nested_absmax": torch.from_numpy(spans),
                "weight.nested_quant_map": nf4.dynamic_levels(),
            }
            levels = nf4.dynamic_levels().numpy()[codes]
            largest = levels * np.repeat(spans, 256)[:blocks] + offset
        else:
            largest = rng.uniform(0.02, 0.04, blocks).astype("f4")
            tensors["weight.absmax"] = torch.from_numpy(largest)
        text = json.dumps(state).encode()
        tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(
            list(text), dtype=torch.uint8
        )
        weights = nf4.levels().numpy()[numbers.reshape(-1)] * np.repeat(largest, 64)
        return tensors, weights.reshape(rows, width)

    return pack


def int8(rows: int, width: int, rng: np.random.Generator) -> Packed:
    integers = rng.integers(-127, 128, (rows, width)).astype("i1")
    largest = rng.uniform(0.02, 0.04, rows).astype("f4")
    tensors = {
        "weight": torch.from_numpy(integers),
        "SCB": torch.from_numpy(largest),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    step = np.float32(7.874015718698502e-3)
    return tensors, integers.astype("f4") * largest[:, None] * step


def _gptq(size: int, **more: Any) -> dict[str, Any]:
    common = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "lm_head": False}
    history = {"damp_percent": 0.05, "true_sequential": True, "meta": {"quantizer": ["x:1"]}}
    return {**common, **history, "group_size": size, **more}


def _awq(size: int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": None,
    }


def _compressed(size: int | None, **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if size else "channel",
        "group_size": size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        **more,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _bnb(**more: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": "load_in_4bit" in more,
        "_load_in_8bit": "load_in_8bit" in more,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        **more,
    }


LAYOUTS: dict[str, Layout] = {
    "gptq-32": Layout(config=_gptq(32), pack=gptq(32), scheme="int4-g32-f16"),
    "gptq-64": Layout(config=_gptq(64), pack=gptq(64), scheme="int4-g32-f16"),
    "gptq-128": Layout(config=_gptq(128), pack=gptq(128), scheme="int4-g128-f16"),
    "gptq-row": Layout(config=_gptq(-1), pack=gptq(-1), scheme="int4-g128-f16"),
    "gptq-bf16": Layout(config=_gptq(32), pack=gptq(32, bf16=True), scheme="int4-g32"),
    "gptq-v2": Layout(
        config=_gptq(32, checkpoint_format="gptq_v2"),
        pack=gptq(32, version=2),
        scheme="int4-g32-f16",
    ),
    "gptq-zeros": Layout(
        config=_gptq(128, sym=False), pack=gptq(128, zero=True), scheme="uint4-g128-f16"
    ),
    "gptq-zeros-v2": Layout(
        config=_gptq(32, sym=False, format="gptq_v2", method="gptq", pack_dtype="int32"),
        pack=gptq(32, zero=True, version=2),
        scheme="uint4-g32-f16",
    ),
    "gptq-static-order": Layout(
        config=_gptq(32, desc_act=True), pack=gptq(32), scheme="int4-g32-f16"
    ),
    "gptq-sorted": Layout(config=_gptq(32, desc_act=True), pack=gptq(32, sort=True), scheme="f32"),
    "gptq-sorted-zeros": Layout(
        config=_gptq(64, desc_act=True, sym=False),
        pack=gptq(64, sort=True, zero=True),
        scheme="f32",
    ),
    "awq-32": Layout(config=_awq(32), pack=awq(32), scheme="uint4-g32-f16"),
    "awq-128": Layout(config=_awq(128), pack=awq(128), scheme="uint4-g128-f16"),
    "awq-row": Layout(
        config={"quant_method": "awq", "w_bit": 4, "q_group_size": -1},
        pack=awq(-1),
        scheme="uint4-g128-f16",
    ),
    "compressed-32": Layout(config=_compressed(32), pack=compressed(32), scheme="int4-g32"),
    "compressed-128-f16": Layout(
        config=_compressed(128), pack=compressed(128, dtype=torch.float16), scheme="int4-g128-f16"
    ),
    "compressed-row": Layout(config=_compressed(None), pack=compressed(None), scheme="int4-g128"),
    "compressed-zeros": Layout(
        config=_compressed(64, symmetric=False), pack=compressed(64, zero=True), scheme="uint4-g32"
    ),
    "compressed-f32": Layout(
        config=_compressed(32), pack=compressed(32, dtype=torch.float32), scheme="f32"
    ),
    "compressed-sorted": Layout(
        config=_compressed(32, actorder="group"), pack=compressed(32, sort=True), scheme="f32"
    ),
    "nf4": Layout(
        config=_bnb(load_in_4bit=True, bnb_4bit_use_double_quant=True),
        pack=nf4_of(nested=True),
        scheme="nf4",
    ),
    "nf4-single": Layout(config=_bnb(load_in_4bit=True), pack=nf4_of(nested=False), scheme="f32"),
    "int8": Layout(config=_bnb(load_in_8bit=True), pack=int8, scheme="int8"),
}


def is_packed(name: str) -> bool:
    return "_proj.weight" in name


def packed_checkpoint(
    to: Path, layout: Layout, config: Mapping[str, Any] = CONFIG
) -> PreTrainedModel:
    """A random model with its linears packed, as a directory; the model of the same weights."""
    model = oracle(dict(config))
    model.save_pretrained(to)
    tensors = load_file(to / "model.safetensors")
    rng = np.random.default_rng(5)
    weights: Tensors = {}
    for name in [name for name in tensors if is_packed(name)]:
        parts, weight = layout.pack(*tensors.pop(name).shape, rng)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in parts.items()}
        weights[name] = torch.from_numpy(weight)
    save_file({name: t.contiguous() for name, t in tensors.items()}, to / "model.safetensors")
    written = json.loads((to / "config.json").read_text())
    written["quantization_config"] = dict(layout.config)
    (to / "config.json").write_text(json.dumps(written))
    model.load_state_dict(weights, strict=False)
    return model
