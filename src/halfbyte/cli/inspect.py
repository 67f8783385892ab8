"""`halfbyte inspect`: a page about a model that a person can hold against its model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document
from halfbyte.cli.values import gib
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.formats.checkpoint import Checkpoint
    from halfbyte.specs import AttentionSpec
    from halfbyte.text.assets import TextAssets


@click.command("inspect")
@flags.MODEL
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--template", is_flag=True, help="Print the chat template.")
@flags.JSON
def command(model: str, tensors: bool, template: bool, as_json: bool) -> None:
    """Say what MODEL is, from its headers; no weights are read and no code is run."""
    from halfbyte.formats.checkpoint import read
    from halfbyte.formats.reference import locate

    path = locate(model)
    source = read(path)
    if as_json:
        document("inspect", _fields(path, source))
        return
    click.echo(f"{path}")
    _say("family", f"{source.spec.family} ({source.spec.architecture})")
    _describe_model(source)
    _describe_storage(source)
    _describe_text(source)
    if tensors:
        for name, shape, scheme, size in _tensors(source):
            click.echo(f"  {name:40} {scheme:6} {gib(size):>11}  {list(shape)}")
    if template and source.assets is not None:
        click.echo(source.assets.template or "(no chat template)")


def _say(word: str, text: object) -> None:
    click.echo(f"  {word:12} {text}")


def _describe_model(source: Checkpoint) -> None:
    spec = source.spec
    _say("parameters", f"{spec.parameters:,}")
    _say("hidden", f"{spec.hidden}, vocabulary {spec.vocab}, context {spec.context}")
    kinds = Counter(layer.attention for layer in spec.layers)
    _say("layers", len(spec.layers))
    for attention, count in kinds.items():
        click.echo(f"    {count} x {_attention(attention)}")
    for width, count in Counter(layer.mlp.width for layer in spec.layers).items():
        click.echo(f"    {count} x MLP {width} ({spec.layers[0].mlp.activation})")
    for experts, count in Counter(layer.experts for layer in spec.layers).items():
        if experts is not None:
            click.echo(f"    {count} x {experts.used} of {experts.count} experts {experts.width}")
    shared = sum(layer.kv_source is not None for layer in spec.layers)
    if shared:
        click.echo(f"    {shared} x keys and values of an earlier layer")
    if spec.per_layer is not None:
        click.echo(f"    {len(spec.layers)} x embedding of its own {spec.per_layer.width}")
    extras = [f"embedding x {spec.embed_scale:g}"] if spec.embed_scale != 1 else []
    extras += [f"logits soft-capped at {spec.logit_softcap:g}"] if spec.logit_softcap else []
    extras += ["head tied to the embedding" if spec.tied_head else "head of its own"]
    _say("ends", ", ".join(extras))


def _attention(attention: AttentionSpec) -> str:
    sees = "full" if attention.window is None else f"sliding {attention.window}"
    parts = [f"{attention.heads} heads, {attention.kv_heads} key/value x {attention.head_dim}"]
    rope = attention.rope
    parts.append(
        f"rope {rope.theta:g}" + (f" ({rope.scaling})" if rope.divisors is not None else "")
    )
    parts.append(f"scale {attention.scale:.4g}")
    parts += ["q/k norms"] if attention.qk_norm else []
    parts += ["K = V"] if attention.shares_kv else []
    parts += ["biases"] if attention.qkv_bias else []
    return f"{sees} attention: " + ", ".join(parts)


def _tensors(source: Checkpoint) -> list[tuple[str, tuple[int, ...], str, int]]:
    return [
        (tensor.name, tensor.shape, scheme.name, scheme.bytes(tensor.shape))
        for tensor in source.spec.tensors()
        for scheme in (source.schemes[tensor.name],)
    ]


def _describe_storage(source: Checkpoint) -> None:
    rows = _tensors(source)
    total = sum(size for *_, size in rows)
    bits = 8 * total / source.spec.parameters
    _say("stored", f"{gib(total)} in {len(rows)} tensors, {bits:.2f} bits per weight")
    sizes: Counter[str] = Counter()
    for _, _, scheme, size in rows:
        sizes[scheme] += size
    common = sizes.most_common(1)[0][0]
    for scheme, size in sizes.most_common():
        click.echo(f"    {scheme:6} {gib(size):>11}  {_which(rows, scheme, common)}")
    if source.unused:
        _say("not used", f"{len(source.unused)} tensors of other modalities or copies")


def _which(rows: Sequence[tuple[str, tuple[int, ...], str, int]], scheme: str, common: str) -> str:
    """The matrices that are stored in another way than most."""
    names = [name for name, shape, stored, _ in rows if stored == scheme and len(shape) > 1]
    if scheme == common:
        return f"{len(names)} matrices"
    if not names:
        return "vectors"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _describe_text(source: Checkpoint) -> None:
    assets = source.assets
    if assets is None:
        _say("tokenizer", "none")
        return
    vocabulary = assets.vocabulary
    _say("tokenizer", f"{vocabulary.model}, {len(vocabulary.tokens)} tokens")
    _say("BOS", f"{assets.bos_id} {assets.token(assets.bos_id)!r}, added: {assets.add_bos}")
    _say("stops", ", ".join(f"{i} {assets.token(i)!r}" for i in _stop_ids(assets)))
    _say("template", "none" if assets.template is None else f"{len(assets.template)} characters")
    generation = asdict(assets.generation)
    knobs = {k: v for k, v in generation.items() if v not in (None, ()) and k != "eos_ids"}
    _say("sampling", ", ".join(f"{k} {v}" for k, v in knobs.items()) or "no defaults")


def _stop_ids(assets: TextAssets) -> list[int]:
    from halfbyte.text.chat import Chat
    from halfbyte.text.tokenizer import Tokenizer

    try:
        return sorted(Chat(Tokenizer(assets), assets).stop_ids)
    except HalfbyteError:
        return sorted(assets.generation.eos_ids)


def _fields(path: Path, source: Checkpoint) -> dict[str, Any]:
    assets = source.assets
    spec = asdict(source.spec)
    for layer in spec["layers"]:
        # JSON has no infinity: a pair that does not rotate is null.
        divisors = layer["attention"]["rope"]["divisors"]
        if divisors is not None:
            layer["attention"]["rope"]["divisors"] = [
                None if isinf(divisor) else divisor for divisor in divisors
            ]
    return {
        "path": str(path),
        "spec": spec,
        "parameters": source.spec.parameters,
        "tensors": [
            {"name": name, "shape": list(shape), "scheme": scheme, "bytes": size}
            for name, shape, scheme, size in _tensors(source)
        ],
        "unused": list(source.unused),
        "stop_ids": None if assets is None else _stop_ids(assets),
        "bos_id": None if assets is None else assets.bos_id,
        "template": None if assets is None else assets.template,
    }
