"""The row of a name table: one tensor, three names.

A table is written once per family with `{i}` for the layer; it is expanded for a spec and used in
both directions. Nothing else in the package knows a foreign tensor name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from halfbyte.specs import ModelSpec


@dataclass(frozen=True, slots=True)
class Name:
    """`ours`; `hf` without the checkpoint's prefix; `gguf`.

    `paired_heads`: the rows of each head lie in rotated-pair order (0, d/2, 1, d/2+1, ...) in the
    GGUF, because its architecture rotates neighbours; ours and Hugging Face's lie in halves.
    `offset`: what Hugging Face's numbers lack, for norms that multiply by 1 + w; ours and the
    GGUF's are the effective multipliers.
    """

    ours: str
    hf: str
    gguf: str
    paired_heads: int | None = None
    offset: float = 0.0


# ours, Hugging Face, GGUF: the rows every decoder of the Llama line has.
COMMON: tuple[tuple[str, str, str], ...] = (
    ("embed.weight", "embed_tokens.weight", "token_embd.weight"),
    ("norm.weight", "norm.weight", "output_norm.weight"),
    ("head.weight", "lm_head.weight", "output.weight"),
    ("layers.{i}.attn_norm.weight", "layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    *(
        (f"layers.{{i}}.attn.{ours}.{part}", f"layers.{{i}}.self_attn.{hf}.{part}", f"blk.{{i}}.{gguf}.{part}")
        for ours, hf, gguf in (
            ("q", "q_proj", "attn_q"),
            ("k", "k_proj", "attn_k"),
            ("v", "v_proj", "attn_v"),
            ("o", "o_proj", "attn_output"),
        )
        for part in ("weight", "bias")
    ),
    ("layers.{i}.attn.q_norm.weight", "layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    ("layers.{i}.attn.k_norm.weight", "layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
    *(
        (f"layers.{{i}}.mlp.{ours}.{part}", f"layers.{{i}}.mlp.{ours}_proj.{part}", f"blk.{{i}}.ffn_{ours}.{part}")
        for ours in ("gate", "up", "down")
        for part in ("weight", "bias")
    ),
)  # fmt: skip


def of_layers(*rows: tuple[str, str, str]) -> tuple[tuple[str, str, str], ...]:
    """Rows of a layer's tensors, given without the layer's part of each name."""
    return tuple((f"layers.{{i}}.{a}", f"layers.{{i}}.{b}", f"blk.{{i}}.{c}") for a, b, c in rows)


# The norms of Gemma, before and after each part.
BOTH_NORMS = of_layers(
    ("attn_post_norm.weight", "post_attention_layernorm.weight", "post_attention_norm.weight"),
    ("mlp_norm.weight", "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    ("mlp_post_norm.weight", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
)


def expand(
    spec: ModelSpec,
    rows: Iterable[tuple[str, str, str]],
    *,
    paired: frozenset[str] = frozenset(),
    norm_offset: float = 0.0,
) -> dict[str, Name]:
    """The table of this spec: our tensor name -> `Name`, for exactly the tensors it stores.

    `paired` lists the endings of our names whose rows the GGUF keeps in rotated-pair order;
    `norm_offset` is the offset of every norm.
    """
    table: dict[str, Name] = {}
    templates = {ours: (hf, gguf) for ours, hf, gguf in rows}
    for tensor in spec.tensors():
        template, layer = _template(tensor.name)
        hf, gguf = templates[template]
        heads = None
        if layer is not None and template.endswith(tuple(paired)) and paired:
            attention = spec.layers[layer].attention
            heads = attention.heads if ".q." in template else attention.kv_heads
        index = "" if layer is None else str(layer)
        table[tensor.name] = Name(
            ours=tensor.name,
            hf=hf.replace("{i}", index),
            gguf=gguf.replace("{i}", index),
            paired_heads=heads,
            offset=norm_offset if template.endswith("norm.weight") else 0.0,
        )
    return table


def _template(name: str) -> tuple[str, int | None]:
    if not name.startswith("layers."):
        return name, None
    _, index, rest = name.split(".", 2)
    return f"layers.{{i}}.{rest}", int(index)
