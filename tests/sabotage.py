"""Sabotage: sound checkpoints, the known disasters planted in them, and what they then measure.

    OMP_NUM_THREADS=1 PYTHONPATH=src:tests python -m sabotage

prints the tables of docs/troubleshooting.md.

A fault changes what a model says of itself, its weights, its text assets or its computation, and
nothing else. Expects the shared fixtures (tests/conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle import GEMMA3, GEMMA4, oracle, source_of
from torch import Tensor

from halfbyte.evals.diagnose import diagnose, differences
from halfbyte.evals.fidelity import Fidelity, measure
from halfbyte.evals.gate import default_gate, misses
from halfbyte.evals.reference import Baseline, Reference
from halfbyte.evals.texts import Reading, Text, Window, cut, read_text
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.paired import to_pairs
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import SCHEMES, LayerSpec, ModelSpec, Scheme, recipe_of
from halfbyte.text.assets import TextAssets
from halfbyte.text.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
PLACES = {"gemma4": "models/tiny-gemma4", "llama": "models/stories260K"}
# Of random weights: the trained one's layer scalars are all 1, and it hardly looks far back.
RANDOM = {"gemma3, random": GEMMA3, "gemma4, random": GEMMA4}
BOOKS = "data/heldout/books_heldout.txt"
WINDOW, WINDOWS = 512, 4

TensorChange = Callable[[str, QTensor], QTensor]


@dataclass(frozen=True)
class Sabotaged:
    """A source with something wrong with it."""

    sound: Source
    spec: ModelSpec
    assets: TextAssets | None
    change: TensorChange

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        return self.sound.schemes

    def tensor(self, name: str) -> QTensor:
        return self.change(name, self.sound.tensor(name))

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for tensor in self.spec.tensors():
            yield tensor.name, self.tensor(tensor.name)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`says`: a part of the cause that must be named. `model`: what it is planted in."""

    name: str
    says: str
    model: str = "gemma4"
    recipe: str = "f32"
    spec: Callable[[ModelSpec], ModelSpec] = lambda spec: spec
    assets: Callable[[TextAssets], TextAssets] = lambda assets: assets
    change: TensorChange = lambda name, q: q
    ops: Callable[[], ReferenceOps] = field(default=lambda: ReferenceOps(exact_rows=False))


@cache
def sound(model: str) -> Source:
    """The checkpoint before the fault."""
    if model in RANDOM:
        return source_of(oracle(RANDOM[model]), RANDOM[model])
    return read(SHARED / PLACES[model])


@cache
def text_for(model: str) -> Text:
    """Real text for trained models, random tokens for the random one."""
    source = sound(model)
    if source.assets is None:
        ids = np.random.default_rng(5).integers(0, source.spec.vocab, WINDOW * WINDOWS)
        return Text(name="random", token_ids=ids.tolist(), bos=[2])
    return read_text(SHARED / BOOKS, Tokenizer(source.assets))


@dataclass(frozen=True)
class Kept:
    """A source whose tensors are made once."""

    spec: ModelSpec
    assets: TextAssets | None
    schemes: Mapping[str, Scheme]
    kept: Mapping[str, QTensor]

    def tensor(self, name: str) -> QTensor:
        return self.kept[name]

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        yield from self.kept.items()


@cache
def stored(model: str, recipe: str) -> Source:
    """The sound checkpoint, stored by a recipe."""
    made = Quantized(sound(model), recipe_of(recipe), method="rtn")
    return Kept(made.spec, made.assets, made.schemes, dict(made.tensors()))


def planted(fault: Fault, recipe: str | None = None) -> Source:
    """The checkpoint with the fault."""
    source = stored(fault.model, recipe or fault.recipe)
    assets = None if source.assets is None else fault.assets(source.assets)
    return Sabotaged(source, fault.spec(source.spec), assets, fault.change)


@cache
def windows_for(model: str, count: int) -> list[Window]:
    """The first windows of its text, scored from position 0."""
    return cut(text_for(model), Reading(protocol="full", window=WINDOW, max_windows=count))


@cache
def baseline(model: str, count: int) -> Baseline:
    """What the sound checkpoint makes of them."""
    reference = Reference(sound(model), ReferenceOps(exact_rows=False))
    return reference.read([windows_for(model, count)])[0]


def measured(source: Source, model: str, ops: ReferenceOps, windows: int) -> Fidelity:
    """A source against the sound checkpoint."""
    return measure(
        load(source, ops),
        windows_for(model, windows),
        name=model,
        reference=baseline(model, windows),
    )


def vectors(ending: str, change: Callable[[Tensor], Tensor]) -> TensorChange:
    """A change of the numbers of all vectors with this ending."""

    def changed(name: str, q: QTensor) -> QTensor:
        if len(q.shape) > 1 or not name.endswith(ending):
            return q
        return encode(change(decode(q)), SCHEMES["f32"])

    return changed


def on_layers(*, sliding: bool, **changes: Any) -> Callable[[ModelSpec], ModelSpec]:
    """A change of the attention of one kind of layer; `rope` takes its fields as a dict."""

    def changed(layer: LayerSpec) -> LayerSpec:
        attention = layer.attention
        if (attention.window is not None) != sliding:
            return layer
        rope = replace(attention.rope, **changes.get("rope", {}))
        rest = {name: value for name, value in changes.items() if name != "rope"}
        return replace(layer, attention=replace(attention, rope=rope, **rest))

    return lambda spec: replace(spec, layers=tuple(map(changed, spec.layers)))


def swapped_nibbles(name: str, q: QTensor) -> QTensor:
    """Every byte of weights turned around."""
    if q.scheme.name != "q4_0":
        return q
    blocks = q.data.reshape(-1, 18).copy()
    blocks[:, 2:] = (blocks[:, 2:] >> 4) | (blocks[:, 2:] << 4)
    return QTensor(q.scheme, q.shape, blocks.reshape(q.data.shape))


def interleaved_nibbles(name: str, q: QTensor) -> QTensor:
    """Weights 2i and 2i + 1 in byte i, where i and i + 16 belong."""
    if q.scheme.name != "q4_0":
        return q
    blocks = q.data.reshape(-1, 18).copy()
    weights = np.concatenate((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), axis=1)
    blocks[:, 2:] = weights[:, 0::2] | (weights[:, 1::2] << 4)
    return QTensor(q.scheme, q.shape, blocks.reshape(q.data.shape))


def shifted_rows(name: str, q: QTensor) -> QTensor:
    """The embedding of every token is that of the one before."""
    return q.take_rows(np.arange(-1, q.num_rows - 1) % q.num_rows) if name == "embed.weight" else q


def unordered_rows(name: str, q: QTensor) -> QTensor:
    """Keys in the order of neighbouring pairs, as GGUF files of Llama have them."""
    return to_pairs(q, 4) if name.endswith("attn.k.weight") else q


class NormedValues(ReferenceOps):
    """Where K = V, takes the values behind the norm of the keys instead of before it."""

    def rope_and_store(self, q: Any, k: Any, v: Any, **given: Any) -> Any:
        attention, norm = given["attention"], given["k_norm"]
        if attention.shares_kv:
            heads = v.unflatten(-1, (-1, attention.head_dim))
            v = self.rms_norm(heads, norm, given["eps"]).flatten(-2)
        return super().rope_and_store(q, k, v, **given)


def one_off(assets: TextAssets) -> TextAssets:
    tokens = assets.vocabulary.tokens
    vocabulary = replace(assets.vocabulary, tokens=(tokens[-1], *tokens[:-1]))
    return replace(assets, vocabulary=vocabulary)


FAULTS = (
    Fault(
        name="local rope base 1e6 for 1e4",
        spec=on_layers(sliding=True, rope={"theta": 1e6}),
        says="sliding layers: rope base is 1e+06",
    ),
    Fault(
        name="global rope base 1e4 for 1e6",
        spec=on_layers(sliding=False, rope={"theta": 1e4}),
        says="full layers: rope base is 10000",
    ),
    Fault(
        name="proportional rope taken as full rotation",
        spec=on_layers(sliding=False, rope={"divisors": None}),
        says="full layers: rope scaling is none",
    ),
    Fault(
        name="linear rope factor 8 on local layers",
        spec=on_layers(sliding=True, rope={"divisors": (8.0,) * 32, "scaling": "linear, factor 8"}),
        says="sliding layers: rope scaling is linear",
    ),
    Fault(
        name="sliding window halved",
        spec=on_layers(sliding=True, window=64),
        says="sliding window is 64",
    ),
    Fault(
        name="sliding window ignored",
        spec=on_layers(sliding=True, window=None),
        says="sliding window is none",
    ),
    Fault(
        name="attention scale 1/sqrt(d) for 1",
        spec=lambda spec: on_layers(sliding=True, scale=64**-0.5)(
            on_layers(sliding=False, scale=128**-0.5)(spec)
        ),
        says="attention scale is 0.125",
    ),
    Fault(
        name="logit soft-cap dropped",
        spec=lambda spec: replace(spec, logit_softcap=None),
        says="logit soft-cap is none",
    ),
    Fault(
        name="embedding multiplier dropped",
        spec=lambda spec: replace(spec, embed_scale=1.0),
        says="embedding multiplier is 1",
    ),
    Fault(
        name="layer scalars dropped",
        model="gemma4, random",
        change=vectors("scalar", torch.ones_like),
        says="all 1, as if it had been dropped",
    ),
    Fault(
        name="1 + w for w (Gemma 4)",
        change=vectors("norm.weight", lambda w: w + 1),
        says="1 is added",
    ),
    Fault(
        name="w for 1 + w (Gemma 3)",
        model="gemma3, random",
        change=vectors("norm.weight", lambda w: w - 1),
        says="1 is missing",
    ),
    Fault(
        name="K = V: values taken behind the norm of the keys",
        model="gemma4, random",
        ops=lambda: NormedValues(exact_rows=False),
        says="the computation differs",
    ),
    Fault(
        name="K = V: the norm of the values left out",
        model="gemma4, random",
        spec=on_layers(sliding=False, value_norm=False),
        says="norm of values is False",
    ),
    Fault(
        name="keys not brought into our order of rotation",
        model="llama",
        change=unordered_rows,
        says="order of rotation",
    ),
    Fault(
        name="nibbles swapped in q4_0 blocks",
        recipe="q4_0",
        change=swapped_nibbles,
        says="nibbles of each block are swapped",
    ),
    Fault(
        name="nibbles interleaved in q4_0 blocks",
        recipe="q4_0",
        change=interleaved_nibbles,
        says="nibbles of each block are interleaved",
    ),
    Fault(
        name="embedding off by one row",
        change=shifted_rows,
        says="the rows stand one too late",
    ),
)

# Nothing of these is in the logits of given ids, so no KL tells: what the text assets say does.
TEXT_FAULTS = (
    Fault(
        name="vocabulary off by one",
        assets=one_off,
        says="off by +1",
    ),
    Fault(
        name="BOS missing",
        model="llama",
        assets=lambda assets: replace(assets, add_bos=False),
        says="texts begin with no BOS",
    ),
)


def main() -> None:
    """Prints the tables in Markdown."""
    print("| stored as | KL | same top-1 | perplexity | gate |\n|---|---|---|---|---|")
    for recipe in ("bf16", "q8_0", "q4_0", "q4_0-pure"):
        _sound_row(recipe)
    print("\n| fault | model | stored as | KL | same top-1 | perplexity | caught by | named |")
    print("|---|---|---|---|---|---|---|---|")
    for fault in FAULTS:
        # Random weights do not survive four bits, with or without a fault.
        for recipe in {fault.recipe: 0, **({"q4_0": 0} if fault.model == "gemma4" else {})}:
            _fault_row(fault, recipe)


def _sound_row(recipe: str) -> None:
    source = stored("gemma4", recipe)
    found = measured(source, "gemma4", ReferenceOps(activations="q8_0"), WINDOWS)
    gate = default_gate(source.spec, source.schemes).every.values()
    print(f"| {recipe} | {_numbers(found)} | {', '.join(f'{value:g}' for value in gate)} |")


def _fault_row(fault: Fault, recipe: str) -> None:
    source = planted(fault, recipe)
    found = measured(source, fault.model, fault.ops(), WINDOWS)
    missed = misses(default_gate(source.spec, source.schemes), [found])
    cause = diagnose(source, sound(fault.model), [found]).causes[0]
    told = differences(source, sound(fault.model))
    caught = ", ".join(miss.number for miss in missed) or ("description" if told else "nothing")
    numbers = _numbers(found)
    print(f"| {fault.name} | {fault.model} | {recipe} | {numbers} | {caught} | {cause} |")


def _numbers(found: Fidelity) -> str:
    assert found.kl is not None and found.reference_perplexity is not None
    rise = found.perplexity / found.reference_perplexity - 1
    return f"{found.kl.mean:.2g} | {found.same_top1:.1%} | {rise:+.1%}"


if __name__ == "__main__":
    main()
