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
class State:
    """What the JSON of a matrix says: its shape, and the mean magnitude of its blocks, which are
    quantized themselves, or None."""

    shape: tuple[int, int]
    offset: float | None

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // BLOCK)

    def describe(self) -> Description:
        if self.offset is None:
            reason = "nf4 without double quantization"
        elif self.shape[1] % BLOCK:
            reason = f"nf4 of widths that are no multiple of {BLOCK}"
        else:
            return Description(scheme=SCHEMES["nf4"], shape=self.shape)
        return Description(scheme=SCHEMES["f32"], shape=self.shape, decoded=reason)


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
        return self._state(parts).describe()

    def unpack(self, parts: Parts) -> QTensor:
        state = self._state(parts)
        found = state.describe()
        rows, width = found.shape
        pairs = parts.array("weight", "U8", (-(-rows * width // 2), 1)).reshape(-1)
        _check_levels(parts, state)
        if found.scheme.name == "nf4":
            return QTensor(found.scheme, found.shape, _rows(parts, state, pairs))
        weights = _decoded(parts, state, pairs)[: rows * width].reshape(rows, width)
        return QTensor(found.scheme, found.shape, weights.view(np.uint8))

    def _state(self, parts: Parts) -> State:
        place = f"{parts.module}.{STATE}"
        text = parts.array(STATE, "U8").tobytes()
        state = table(parse_json(text, where=Path(place)), place)
        refuse_unknown(state, KNOWN_OF_STATES)
        require(state, "quant_type", ("nf4",))
        require(state, "blocksize", (BLOCK,))
        if (state.get("nested_blocksize") is not None) != self.nested:
            raise IntegrityError(
                f"{FIELD}.bnb_4bit_use_double_quant is {self.nested}, and its weights are not so",
                where=parts.module,
            )
        if not self.nested:
            return State(shape=_shape(state), offset=None)
        require(state, "nested_blocksize", (SPAN,))
        require(state, "nested_dtype", ("float32",))
        return State(shape=_shape(state), offset=_offset(state))


def _shape(state: Fields) -> tuple[int, int]:
    sizes = list(state.sequence("shape") or ())
    if len(sizes) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise IntegrityError(f"{state.prefix}shape is {sizes!r:.60}")
    return sizes[0], sizes[1]


def _offset(state: Fields) -> float:
    value = state.get("nested_offset")
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise IntegrityError(f"{state.prefix}nested_offset is {value!r:.40}")
    return float(value)


def _check_levels(parts: Parts, state: State) -> None:
    """The levels of our `nf4`; a checkpoint with others would decode to other numbers."""
    from halfbyte.numerics import nf4  # brings torch, which headers do without

    expected = {"weight.quant_map": nf4.levels()}
    if state.offset is not None:
        expected["weight.nested_quant_map"] = nf4.dynamic_levels()
    for ending, levels in expected.items():
        found = parts.array(ending, "F32", tuple(levels.shape))
        if not np.array_equal(found, levels.numpy()):
            raise UnsupportedError(f"'{ending}' has other levels", where=parts.module)


def _rows(parts: Parts, state: State, pairs: np.ndarray) -> np.ndarray:
    """The bytes of our `nf4`."""
    import torch

    from halfbyte.numerics import nf4

    rows = nf4.rows_of(
        torch.tensor(pairs.reshape(state.shape[0], -1)),
        torch.tensor(parts.array("weight.absmax", "U8", (state.blocks,))),
        torch.tensor(_spans(parts, state)),
        torch.tensor(state.offset, dtype=torch.float32),
    )
    return rows.numpy()


def _decoded(parts: Parts, state: State, pairs: np.ndarray) -> np.ndarray:
    """f32 [weights]: level * magnitude of the block."""
    from halfbyte.numerics import nf4

    if state.offset is None:
        magnitudes = parts.array("weight.absmax", "F32", (state.blocks,))
    else:
        dynamic = nf4.dynamic_levels().numpy()
        spans = np.repeat(_spans(parts, state), SPAN)[: state.blocks]
        stored = parts.array("weight.absmax", "U8", (state.blocks,))
        magnitudes = dynamic[stored] * spans + np.float32(state.offset)
    levels = nf4.levels().numpy()[np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)]
    return levels * np.repeat(magnitudes, BLOCK)[: len(levels)]


def _spans(parts: Parts, state: State) -> np.ndarray:
    return parts.array("weight.nested_absmax", "F32", (-(-state.blocks // SPAN),))
