"""Gemma 4's drafters ("assistants"), and drafters of that architecture for any other target.

A drafter is described by the text config of a small Gemma 4 with queries only, and the width of its
target. It has no soft-cap and no embeddings of its own; its table serves as the head. The drafters
of E2B and E4B have a head in clusters ("ordered embeddings").

What the published dialect has no field for stands in a table `halfbyte` (in a GGUF, under keys of
that name): which layers are read where it is not the last of each kind, a shortlist of tokens, the
position of the queries, the target. By default a query stands at the last token, one after the last
key it sees, as in Transformers and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families import gemma4
from halfbyte.families.family import Family, Header
from halfbyte.families.fields import Fields
from halfbyte.families.names import BOTH_NORMS, COMMON, Name, expand
from halfbyte.specs import (
    AttentionSpec,
    CentroidSpec,
    DrafterSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
)

OWN = "halfbyte"
AHEAD = 1


def drafter_for(
    target: ModelSpec,
    *,
    reads: Sequence[int],
    hidden: int,
    width: int,
    head_rows: int | None = None,
    fingerprint: str | None = None,
) -> ModelSpec:
    """The spec of a drafter for any target, one layer for each of the target's that it `reads`.

    `reads` are indices of layers that keep keys of their own; the last one sees everything.
    Queries have the heads, the rotation and the sight of the layer they read, their own norm and
    scale 1. `hidden` and `width` (of the MLP) are free, `head_rows` is that of a shortlist.
    """
    return ModelSpec(
        family=FAMILY.name,
        architecture=FAMILY.architectures[0],
        hidden=hidden,
        vocab=target.vocab,
        context=target.context,
        norm_eps=target.norm_eps,
        tied_head=False,
        layers=tuple(_reader(target, index, width) for index in reads),
        drafter=DrafterSpec(
            target_hidden=target.hidden,
            head_rows=head_rows or target.vocab,
            target=fingerprint,
        ),
    )


def _reader(target: ModelSpec, index: int, width: int) -> LayerSpec:
    """A layer that reads the target's layer `index`."""
    read = target.layers[index].attention
    alike = [
        other
        for other, layer in enumerate(target.layers)
        if layer.kv_source is None and (layer.attention.window is None) == (read.window is None)
    ]
    return LayerSpec(
        attention=AttentionSpec(
            heads=read.heads,
            kv_heads=read.kv_heads,
            head_dim=read.head_dim,
            rope=read.rope,
            scale=1.0,
            window=read.window,
            qk_norm=True,
            value_norm=True,
            ahead=AHEAD,
        ),
        mlp=MLPSpec(width=width, activation="gelu_tanh"),
        kv_source=alike.index(index) - len(alike),
        post_norms=True,
        scalar=True,
    )


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a gemma4_assistant or gemma4_unified_assistant config.json."""
    fields = Fields(config)
    body = gemma4.from_config(config)
    own = fields.table(OWN)
    centroids = None
    if fields.flag("use_ordered_embeddings"):
        centroids = CentroidSpec(
            count=fields.integer("num_centroids", 2048),
            used=fields.integer("centroid_intermediate_top_k", 32),
        )
    hidden = fields.integer("backbone_hidden_size", 3840 if _unified(config) else 1536)
    return _model(body, hidden, own, own.integer("head_rows", body.vocab), centroids)


def _unified(config: Mapping[str, Any]) -> bool:
    return "unified" in str(config["model_type"])


def from_header(header: Header) -> ModelSpec:
    """The spec of a GGUF of architecture gemma4-assistant."""
    fields = header.fields()
    own = Fields(fields.values, prefix=f"{fields.prefix}{OWN}.")
    clusters = header.shapes.get("masked_embd_centroids.weight")
    centroids = None
    if clusters is not None:
        centroids = CentroidSpec(count=clusters[0], used=own.integer("centroids_used", 32))
    rows = header.shapes["token_embd.weight"][0]
    body = replace(gemma4.described(header), vocab=fields.integer("vocab_size", rows))
    return _model(body, fields.integer("embedding_length_out"), own, rows, centroids)


def _model(
    body: ModelSpec, target_hidden: int, own: Fields, head_rows: int, centroids: CentroidSpec | None
) -> ModelSpec:
    if body.per_layer is not None or any(layer.experts for layer in body.layers):
        raise UnsupportedError("experts or embeddings per layer in a drafter")
    if centroids is not None and (
        body.vocab % centroids.count or centroids.used > centroids.count or head_rows < body.vocab
    ):
        raise IntegrityError(
            f"{centroids.used} of {centroids.count} clusters do not fit {head_rows} tokens"
        )
    sources = own.sequence("kv_sources") or [-1] * len(body.layers)
    ahead = own.count("query_ahead", AHEAD)
    layers = [
        _layer(layer, source, ahead) for layer, source in zip(body.layers, sources, strict=True)
    ]
    target = own.get("target")
    return replace(
        body,
        family=FAMILY.name,
        architecture=FAMILY.architectures[0],
        tied_head=False,
        layers=tuple(layers),
        embed_scale=1.0,
        logit_softcap=None,
        drafter=DrafterSpec(
            target_hidden=target_hidden,
            head_rows=head_rows,
            centroids=centroids,
            target=None if target is None else str(target),
        ),
    )


def _layer(layer: LayerSpec, source: object, ahead: int) -> LayerSpec:
    if not isinstance(source, int) or source >= 0:
        raise IntegrityError(f"kv_sources has {source!r:.20}; they count from the end, from -1 on")
    attention = replace(layer.attention, shares_kv=False, ahead=ahead)
    return replace(layer, attention=attention, kv_source=source)


def to_metadata(spec: ModelSpec) -> dict[str, Any]:
    """The GGUF metadata of this spec, without the architecture's prefix."""
    assert spec.drafter is not None
    return {
        **gemma4.description(spec),
        "embedding_length_out": spec.drafter.target_hidden,
        "nextn_predict_layers": len(spec.layers),
        "vocab_size": spec.vocab,
        **{f"{OWN}.{key}": value for key, value in _own(spec, spec.drafter).items()},
    }


def _own(spec: ModelSpec, drafter: DrafterSpec) -> dict[str, Any]:
    """The fields of our own, where they are not what is taken without them."""
    ahead = spec.layers[0].attention.ahead
    sources = [layer.kv_source for layer in spec.layers]
    facts: dict[str, Any] = {} if drafter.target is None else {"target": drafter.target}
    facts |= {} if ahead == AHEAD else {"query_ahead": ahead}
    facts |= {} if set(sources) == {-1} else {"kv_sources": sources}
    if drafter.centroids is not None:
        facts["centroids_used"] = drafter.centroids.used
    return facts


ROWS = (
    *COMMON,
    *BOTH_NORMS,
    *gemma4.SCALAR,
    ("pre.weight", "pre_projection.weight", "nextn.pre_projection.weight"),
    ("post.weight", "post_projection.weight", "nextn.post_projection.weight"),
    ("head.weight", "embed_tokens.weight", "token_embd.weight"),
    ("head.tokens", "head_tokens", "head_tokens"),
    ("centroids.weight", "masked_embedding.centroids.weight", "masked_embd_centroids.weight"),
    ("centroids.tokens", "masked_embedding.token_ordering", "masked_embd_ordering"),
)


def names(spec: ModelSpec) -> dict[str, Name]:
    """The name table of this spec."""
    return expand(spec, ROWS)


FAMILY = Family(
    name="gemma4_assistant",
    model_types=("gemma4_assistant", "gemma4_unified_assistant"),
    architectures=("gemma4-assistant",),
    prefixes=("model.", ""),
    from_config=from_config,
    from_header=from_header,
    to_metadata=to_metadata,
    names=names,
    ignored=("lm_head.weight",),
)
