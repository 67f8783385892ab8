"""bitsandbytes checkpoints: NF4 (QLoRA), and int8 by rows (LLM.int8).

    weight                                uint8 [N * K / 2, 1]  pairs of levels, the first one high
    weight.absmax                         uint8 [N * K / 64], or f32 without double quantization
    weight.nested_absmax                  f32, one for 256 of those
    weight.quant_map, .nested_quant_map   the levels
    weight.quant_state.bitsandbytes__nf4  JSON as uint8: shape, block sizes, offset

    weight int8 [N, K] | SCB f32 [N], the largest magnitude of a row | weight_format uint8, 0

Without double quantization (and where a width is no multiple of 64) there is no scheme of ours, and
the weights are decoded to f32: level * absmax, as bitsandbytes computes it.
Source: bitsandbytes 0.50 (functional.py, QuantState.as_dict; nn/modules.py), Transformers' config.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families.fields import Fields
from halfbyte.formats.documents import parse_json
from halfbyte.formats.packed.matrix import Description, Packing, Parts
from halfbyte.formats.packed.settings import FIELD, refuse_unknown, require, table
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES

STATE = "weight.quant_state.bitsandbytes__nf4"
BLOCK, SPAN = 64, 256
HISTORY = ("_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype",
           "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules",
           "llm_int8_threshold")  # fmt: skip
KNOWN = ("bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
         "load_in_4bit", "load_in_8bit", "quant_method", *HISTORY)  # fmt: skip
KNOWN_OF_STATES = ("blocksize", "dtype", "nested_blocksize", "nested_dtype", "nested_offset",
                   "quant_type", "shape")  # fmt: skip


def packing_of(settings: Fields) -> Packing:
    """The layout that the settings describe."""
    refuse_unknown(settings, KNOWN)
    if settings.flag("load_in_4bit") == settings.flag("load_in_8bit"):
        raise IntegrityError(f"{FIELD}: one of load_in_4bit and load_in_8bit is true")
    if settings.flag("load_in_8bit"):
        return Int8Packing()
    require(settings, "bnb_4bit_quant_type", ("nf4",), "fp4")
    require(settings, "bnb_4bit_quant_storage", ("uint8",), "uint8")
    return NF4Packing(nested=settings.flag("bnb_4bit_use_double_quant"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Packing:
    """Rows of int8."""

    mark: str = "SCB"
    parts: Collection[str] = ("weight", "SCB", "weight_format")

    def describe(self, parts: Parts) -> Description:
        rows, width = parts.shape("weight", "I8", 2)
        if "weight_format" in parts and int(parts.array("weight_format", "U8").max()):
            raise UnsupportedError("weight_format is not 0 (rows)", where=parts.module)
        return Description(scheme=SCHEMES["int8"], shape=(rows, width))

    def unpack(self, parts: Parts) -> QTensor:
        import torch  # which headers do without

        from halfbyte.numerics import int8

        found = self.describe(parts)
        largest = torch.tensor(parts.array("SCB", "F32", found.shape[:1]))
        rows = int8.rows_of(torch.tensor(parts.array("weight", "I8")), largest)
        return QTensor(found.scheme, found.shape, rows.numpy())


@dataclass(frozen=True, slots=True, kw_only=True)
class NF4Packing:
    """Blocks of 64 through the whole tensor. `nested`: their magnitudes are quantized, too."""

    nested: bool
    mark: str = STATE
    parts: Collection[str] = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        STATE,
    )

    def describe(self, parts: Parts) -> Description:
        return self._described(_state(parts, nested=self.nested))

    def unpack(self, parts: Parts) -> QTensor:
        state = _state(parts, nested=self.nested)
        found = self._described(state)
        rows, width = found.shape
        pairs = parts.array("weight", "U8", (-(-rows * width // 2), 1)).reshape(-1)
        _check_levels(parts, nested=self.nested)
        if found.scheme.name == "nf4":
            return QTensor(found.scheme, found.shape, _rows(parts, state, pairs))
        weights = _decoded(parts, state, pairs, nested=self.nested)
        weights = weights[: rows * width].reshape(rows, width)
        return QTensor(found.scheme, found.shape, weights.view(np.uint8))

    def _described(self, state: Fields) -> Description:
        sizes = state.sequence("shape") or ()
        if len(sizes) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            raise IntegrityError(f"{state.prefix}shape is {list(sizes)!r:.60}")
        shape = (int(sizes[0]), int(sizes[1]))
        if not self.nested:
            reason = "nf4 without double quantization"
        elif shape[1] % BLOCK:
            reason = f"nf4 of widths that are no multiple of {BLOCK}"
        else:
            return Description(scheme=SCHEMES["nf4"], shape=shape)
        return Description(scheme=SCHEMES["f32"], shape=shape, decoded=reason)


def _state(parts: Parts, *, nested: bool) -> Fields:
    """The JSON that a matrix carries, checked to be what this module reads."""
    place = f"{parts.module}.{STATE}"
    text = parts.array(STATE, "U8").tobytes()
    state = table(parse_json(text, where=Path(place)), place)
    refuse_unknown(state, KNOWN_OF_STATES)
    require(state, "quant_type", ("nf4",))
    require(state, "blocksize", (BLOCK,))
    if (state.get("nested_blocksize") is not None) != nested:
        raise IntegrityError(
            f"{FIELD}.bnb_4bit_use_double_quant is {nested}, and its weights are not so",
            where=parts.module,
        )
    if nested:
        require(state, "nested_blocksize", (SPAN,))
        require(state, "nested_dtype", ("float32",))
    return state


def _check_levels(parts: Parts, *, nested: bool) -> None:
    """The levels of our `nf4`; a checkpoint with others would decode to other numbers."""
    from halfbyte.numerics import nf4  # brings torch, which headers do without

    expected = {"weight.quant_map": nf4.levels()}
    expected |= {"weight.nested_quant_map": nf4.dynamic_levels()} if nested else {}
    for ending, levels in expected.items():
        found = parts.array(ending, "F32", tuple(levels.shape))
        if not np.array_equal(found, levels.numpy()):
            raise UnsupportedError(f"'{ending}' has other levels", where=parts.module)


def _rows(parts: Parts, state: Fields, pairs: np.ndarray) -> np.ndarray:
    """The bytes of our `nf4`."""
    import torch

    from halfbyte.numerics import nf4

    rows = nf4.rows_of(
        torch.tensor(pairs.reshape(_rows_in(state), -1)),
        torch.tensor(_magnitudes(parts, pairs, "U8")),
        torch.tensor(_spans(parts, pairs)),
        torch.tensor(_offset(state), dtype=torch.float32),
    )
    return rows.numpy()


def _decoded(parts: Parts, state: Fields, pairs: np.ndarray, *, nested: bool) -> np.ndarray:
    """f32 [weights]: level * magnitude of the block, in f32."""
    from halfbyte.numerics import nf4

    magnitudes = _magnitudes(parts, pairs, "U8" if nested else "F32")
    if nested:
        spans = np.repeat(_spans(parts, pairs), SPAN)[: len(magnitudes)]
        offset = np.float32(_offset(state))
        magnitudes = nf4.dynamic_levels().numpy()[magnitudes] * spans + offset
    levels = nf4.levels().numpy()[np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)]
    return levels * np.repeat(magnitudes, BLOCK)[: len(levels)]


def _rows_in(state: Fields) -> int:
    return int((state.sequence("shape") or (1,))[0])


def _magnitudes(parts: Parts, pairs: np.ndarray, dtype: str) -> np.ndarray:
    return parts.array("weight.absmax", dtype, (-(-2 * len(pairs) // BLOCK),))


def _spans(parts: Parts, pairs: np.ndarray) -> np.ndarray:
    blocks = -(-2 * len(pairs) // BLOCK)
    return parts.array("weight.nested_absmax", "F32", (-(-blocks // SPAN),))


def _offset(state: Fields) -> float:
    """The mean magnitude; 0 is one, too."""
    value = state.get("nested_offset")
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise IntegrityError(f"{state.prefix}nested_offset is {value!r:.40}")
    return float(value)
