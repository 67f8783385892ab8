"""`halfbyte inspect`: a page about a model that a person can hold against its model card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document
from halfbyte.cli.values import gib
from halfbyte.errors import HalfbyteError
from halfbyte.families import family_of
from halfbyte.families.fields import Fields

if TYPE_CHECKING:
    from halfbyte.formats.checkpoint import Checkpoint
    from halfbyte.specs import AttentionSpec, DrafterSpec, ModelSpec
    from halfbyte.text.assets import TextAssets


@click.command("inspect")
@flags.MODEL
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--template", is_flag=True, help="Print the chat template.")
@flags.JSON
def command(model: str, tensors: bool, template: bool, as_json: bool) -> None:
    """Say what MODEL is, or the LoRA adapter in a directory, from headers; no weights are read and
    no code is run."""
    from halfbyte.cli.adapters import describe
    from halfbyte.formats.checkpoint import read
    from halfbyte.formats.lora import is_adapter
    from halfbyte.formats.reference import locate

    path = locate(model)
    if is_adapter(path):
        describe(path, as_json=as_json)
        return
    source = read(path)
    if as_json:
        document("inspect", _fields(path, source))
        return
    click.echo(f"{path}")
    _say("family", f"{source.spec.family} ({source.spec.architecture})")
    _describe_model(source)
    _describe_storage(source)
    _describe_making(path)
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
    _say("parameters", _parameters(spec))
    _say("hidden", f"{spec.hidden}, vocabulary {spec.vocab}, context {spec.context}")
    _say("layers", len(spec.layers))
    for line, count in Counter(_lines(spec)).items():
        click.echo(f"    {count} x {line}")
    _say("norms", _norms(spec))
    extras = [f"embedding x {spec.embed_scale:g}"] if spec.embed_scale != 1 else []
    extras += [f"logits soft-capped at {spec.logit_softcap:g}"] if spec.logit_softcap else []
    extras += ["head tied to the embedding" if spec.tied_head else "head of its own"]
    _say("ends", ", ".join(extras))
    if spec.drafter is not None:
        _say("drafts for", _target(spec.drafter))


def _target(drafter: DrafterSpec) -> str:
    made_for = "" if drafter.target is None else f", trained for {drafter.target[:8]}"
    return f"a target of width {drafter.target_hidden}{made_for}"


def _parameters(spec: ModelSpec) -> str:
    """All, and those that a token's way through the model reads where those are fewer."""
    idle = sum(
        (layer.experts.count - layer.experts.used) * 3 * layer.experts.width * spec.hidden
        for layer in spec.layers
        if layer.experts is not None
    )
    active = f", {spec.parameters - idle:,} active for a token" if idle else ""
    return f"{spec.parameters:,}{active}"


def _lines(spec: ModelSpec) -> Iterator[str]:
    """What each layer has: attention of all layers first, then the MLPs, then what is rarer."""
    yield from (_attention(layer.attention) for layer in spec.layers)
    yield from (f"MLP {layer.mlp.width} ({layer.mlp.activation})" for layer in spec.layers)
    for experts in (layer.experts for layer in spec.layers if layer.experts is not None):
        yield f"{experts.used} of {experts.count} experts {experts.width}"
    yield from (
        f"keys and values of {'an earlier layer' if spec.drafter is None else 'the target'}"
        for layer in spec.layers
        if layer.kv_source is not None
    )
    if spec.per_layer is not None:
        yield from (f"embedding of its own {spec.per_layer.width}" for _ in spec.layers)
    yield from ("stored scalar at its end" for layer in spec.layers if layer.scalar)


def _norms(spec: ModelSpec) -> str:
    around = "before and after" if spec.layers[0].post_norms else "before"
    offset = family_of(spec).names(spec)["norm.weight"].offset
    times = f"{offset:g} + w in safetensors, w in a GGUF" if offset else "w"
    return f"RMS {around} each part, times {times}, eps {spec.norm_eps:g}"


def _attention(attention: AttentionSpec) -> str:
    sees = "full" if attention.window is None else f"sliding {attention.window}"
    parts = [f"{attention.heads} heads, {attention.kv_heads} key/value x {attention.head_dim}"]
    rope = attention.rope
    parts.append(
        f"rope {rope.theta:g}" + (f" ({rope.scaling})" if rope.divisors is not None else "")
    )
    parts.append(f"scale {attention.scale:.4g}")
    parts += ["q/k norms"] if attention.qk_norm else []
    parts += ["v norm"] if attention.value_norm else []
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
    for line in conversions({scheme for _, shape, scheme, _ in rows if len(shape) > 1}):
        _say("runs as", line)
    for reason, count in Counter(source.decoded.values()).items():
        _say("decoded", f"{count} matrices to f32, exactly: {reason}")
    if source.unused:
        _say("not used", f"{len(source.unused)} tensors of other modalities or copies")


def _describe_making(path: Path) -> None:
    """What the manifest tells, if there is one."""
    from halfbyte.formats.manifest import described

    made = described(path)
    if not made:
        return
    _say("made", f"recipe {made.get('recipe')}, method {made.get('method')}")
    lattice = Fields(made).table("lattice")
    if lattice.values:
        exact, *others = (lattice.count(key) for key in ("exact", "near", "searched"))
        matrices = f"{lattice.count('matrices')} matrices lay on a Q4_0 lattice"
        _say("lattice", f"{matrices}; {exact:,} of {exact + sum(others):,} blocks bit for bit")


def conversions(stored: Collection[str]) -> list[str]:
    """What the native CPU op set converts when it loads a model, for want of a kernel."""
    from halfbyte.kernels.cpu import CPUOps, instruction_set
    from halfbyte.specs import lossless_target, scheme_of

    if instruction_set() is None:
        return []
    targets = {name: lossless_target(scheme_of(name), CPUOps.schemes).name for name in stored}
    return [
        f"{to} on this CPU where {name}, exactly"
        for name, to in sorted(targets.items())
        if to != name
    ]


def _which(rows: Sequence[tuple[str, tuple[int, ...], str, int]], scheme: str, common: str) -> str:
    """The matrices that are stored in another way than most, layers in one."""
    names = [name for name, shape, stored, _ in rows if stored == scheme and len(shape) > 1]
    vectors = sum(stored == scheme and len(shape) == 1 for _, shape, stored, _ in rows)
    parts = [f"{len(names)} matrices"] if scheme == common else _exceptions(names)
    parts += [f"{vectors} vectors"] if vectors else []
    return ", ".join(parts)


def _exceptions(names: Sequence[str]) -> list[str]:
    kinds = Counter(re.sub(r"^layers\.\d+\.", "layers.*.", name) for name in names)
    return [f"{count} {kind}" if "*" in kind else kind for kind, count in kinds.items()]


def _describe_text(source: Checkpoint) -> None:
    assets = source.assets
    if assets is None:
        _say("tokenizer", "none")
        return
    _say("tokenizer", _tokenizer(assets, source.spec.vocab))
    _say("BOS", _bos(assets))
    _say("stops", ", ".join(_stops(assets)) or "none")
    _say("template", _template(assets.template))
    generation = asdict(assets.generation)
    knobs = {k: v for k, v in generation.items() if v not in (None, ()) and k != "eos_ids"}
    _say("sampling", ", ".join(f"{k} {v}" for k, v in knobs.items()) or "no defaults")


def _tokenizer(assets: TextAssets, rows: int) -> str:
    from halfbyte.text.vocabulary import TokenType

    vocabulary = assets.vocabulary
    types = Counter(vocabulary.types)
    splitter = f", splitter {vocabulary.pre}" if vocabulary.model == "gpt2" else ""
    counts = [
        f"{types[kind]} {word}"
        for kind, word in (
            (TokenType.CONTROL, "control"),
            (TokenType.USER_DEFINED, "added"),
            (TokenType.UNUSED, "unused"),
        )
        if types[kind]
    ]
    counts += [f"{rows} rows in the embedding"] if rows != len(vocabulary.tokens) else []
    listed = f" ({', '.join(counts)})" if counts else ""
    return f"{vocabulary.model}{splitter}, {len(vocabulary.tokens)} tokens{listed}"


def _bos(assets: TextAssets) -> str:
    if assets.bos_id is None:
        return "none"
    added = "put before every text, once" if assets.add_bos else "not added"
    always = ", whatever the files say" if assets.vocabulary.model == "gemma4" else ""
    return f"{assets.bos_id} {assets.token(assets.bos_id)!r}, {added}{always}"


def _stops(assets: TextAssets) -> list[str]:
    """Every stop, and where it comes from unless the files list it."""
    stated = assets.generation.eos_ids
    return [
        f"{i} {assets.token(i)!r}" + ("" if i in stated else " from the template")
        for i in _stop_ids(assets)
    ]


def _template(template: str | None) -> str:
    if template is None:
        return "none"
    return f"{len(template)} characters, sha256 {sha256(template.encode()).hexdigest()[:8]}"


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
