"""GPTQ checkpoints, as GPTQModel, AutoGPTQ, Optimum and AutoRound write them.

    qweight int32 [K / 8, N]      eight rows of the transposed weight in a word, lowest bits first
    scales  f16 or bf16 [K / G, N]
    qzeros  int32 [K / G, N / 8]  eight columns in a word; minus 1 in "gptq", not in "gptq_v2"
    g_idx   int32 [K]             the group of each input channel; absent or k // G unless sorted

A weight is scale * (q - zero), q and zero in 0..15; with `sym` every zero is 8. The minus 1 was
taken from whole words, so it is given back to whole words: a borrow that went from nibble to nibble
comes back the same way.
Sources: GPTQModel 7.7 (quantization/config.py, utils/model.py), AutoGPTQ 0.7 (QuantLinear.pack),
AutoRound 0.16 (quantization_config.json).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families.fields import Fields
from halfbyte.formats.packed.groups import SCALES, Grouping, assemble, group_of, in_order, nibbles
from halfbyte.formats.packed.matrix import Description, Parts
from halfbyte.formats.packed.settings import FIELD, group_size, refuse_unknown, require
from halfbyte.numerics.qtensor import QTensor

ONES = 0x11111111
FORMATS = ("gptq", "gptq_v2")
UNPACKED = "-:"  # begins the pattern of modules that stay as they were
# How the checkpoint was made, and hints to other people's kernels.
HISTORY = (
    "act_group_aware", "amp", "autoround_version", "backend", "batch_size",
    "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment", "damp_percent",
    "dataset", "disable_exllama", "enable_quanted_input", "exllama_config",
    "gradient_accumulate_steps", "is_marlin_format", "iters", "lm_head", "low_gpu_mem_usage",
    "lr", "max_input_length", "meta",
    "minmax_lr", "model_file_base_name", "model_name_or_path", "model_seqlen",
    "modules_in_block_to_quantize", "modules_to_not_convert", "module_name_preceding_first_block",
    "mse", "nsamples", "pad_token_id", "provider", "seqlen", "static_groups", "tokenizer",
    "true_sequential", "use_cuda_fp16", "use_exllama",
)  # fmt: skip
KNOWN = (
    "bits", "checkpoint_format", "data_type", "desc_act", "dynamic", "format", "group_size",
    "method", "pack_dtype", "quant_method", "sym", *HISTORY,
)  # fmt: skip


def packing_of(settings: Fields) -> GPTQPacking:
    """The layout that the settings describe."""
    refuse_unknown(settings, KNOWN)
    require(settings, "bits", (4,))
    require(settings, "method", ("gptq",), "gptq")
    require(settings, "pack_dtype", ("int32",), "int32")
    require(settings, "data_type", ("int",), "int")
    _refuse_exceptions(settings)
    require(settings, "is_marlin_format", (False,), False)
    stated = [key for key in ("checkpoint_format", "format") if settings.get(key) is not None]
    names = {require(settings, key, FORMATS) for key in stated} or {"gptq"}
    if len(names) > 1:
        raise IntegrityError(f"{FIELD}.checkpoint_format and {FIELD}.format differ")
    return GPTQPacking(
        size=group_size(settings),
        offset=0 if "gptq_v2" in names else ONES,
        symmetric=settings.flag("sym", True),
        sorted_columns=settings.flag("desc_act"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQPacking:
    """`size`: weights in a group, None for a whole row. `offset`: what a word of zeros lacks.

    `sorted_columns`: groups may follow activation order; whether they do, g_idx says.
    """

    size: int | None
    offset: int
    symmetric: bool
    sorted_columns: bool
    mark: str = "qweight"
    parts: Collection[str] = ("qweight", "qzeros", "scales", "g_idx")

    def describe(self, parts: Parts) -> Description:
        return self._grouping(parts).describe()

    def unpack(self, parts: Parts) -> QTensor:
        grouping = self._grouping(parts)
        rows = grouping.shape[0]
        words = np.ascontiguousarray(parts.array("qweight", "I32").T)  # [N, K / 8]
        return assemble(
            grouping,
            pairs=words.view(np.uint8),
            scales=parts.array("scales", grouping.scale, (grouping.groups, rows)).T,
            zeros=self._zeros(parts, grouping),
            group_of=_group_of(parts, grouping) if grouping.sorted_columns else None,
        )

    def _grouping(self, parts: Parts) -> Grouping:
        words, rows = parts.shape("qweight", "I32", 2)
        if rows % 8:
            raise IntegrityError(
                f"{rows} outputs, which no word of zero points fits", where=parts.module
            )
        plain = Grouping(
            shape=(rows, 8 * words),
            size=self.size or 8 * words,
            scale=parts.dtype("scales", SCALES),
            zero=not self.symmetric,
        )
        if "g_idx" not in parts or in_order(_group_of(parts, plain), plain):
            return plain
        if not self.sorted_columns:
            raise IntegrityError(
                f"{FIELD}.desc_act is false, and its groups are not in order", where=parts.module
            )
        return replace(plain, sorted_columns=True)

    def _zeros(self, parts: Parts, grouping: Grouping) -> np.ndarray | None:
        """uint8 [N, groups]; None where all are 8."""
        rows = grouping.shape[0]
        words = parts.array("qzeros", "I32", (grouping.groups, rows // 8)).view(np.uint32)
        zeros = nibbles(words + np.uint32(self.offset))
        if not self.symmetric:
            return zeros.T
        if bool((zeros != 8).any()):
            raise IntegrityError(
                f"{FIELD}.sym is true, and its zero points are not all 8", where=parts.module
            )
        return None


def _refuse_exceptions(settings: Fields) -> None:
    """Modules that are not packed show that by themselves; others must be packed like all."""
    for pattern in settings.get("dynamic") or {}:
        if not pattern.startswith(UNPACKED):
            raise UnsupportedError(f"{FIELD}.dynamic packs some modules otherwise: {pattern:.60}")


def _group_of(parts: Parts, grouping: Grouping) -> np.ndarray:
    return group_of(parts, "g_idx", grouping)
