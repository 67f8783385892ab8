"""What training takes: weights, gradients, optimizer, activations, and where each of them lies.

Pure arithmetic over a spec. Ways to train are one ledger with other counts: what is trained,
what is frozen and how it is stored, and which part is resident. `states` and `activations` are the
building blocks; a trainer that has measured its own constants gives them as `Constants`. Those that
train on the grid that ships have a ledger of their own (`grid_training.py`).

ZeRO divides what every GPU would hold again: 1 the optimizer's states, 2 the gradients, 3 the
weights. Offload moves them to the host or a disk. Buffers are those of the settings that
`planner/engines.py` writes. What it is not: a measurement. Activations are what autograd keeps of a
decoder with fused attention; a module of another kind is measured, not planned
(`torch.autograd.graph.saved_tensors_hooks`).

Sources: Rajbhandari et al. 2020 (ZeRO); Korthikanti et al. 2022 (activations); DeepSpeed's own
estimates of model states (`tests/test_peers_training.py` compares).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from halfbyte.errors import InvalidInputError
from halfbyte.specs import Basis, LayerSpec, ModelSpec, Scheme, linears

Mode = Literal["full", "lora", "qlora", "qat", "qat-lora", "scales", "blockwise", "adapter"]
Precision = Literal["fp32", "mixed", "bf16"]
Optimizer = Literal["adamw", "adamw-8bit", "sgd"]
Offload = Literal["none", "cpu", "nvme"]
Place = Literal["device", "host", "disk"]

MODES: tuple[Mode, ...] = get_args(Mode)
OURS: tuple[Mode, ...] = ("qat", "qat-lora", "scales", "blockwise", "adapter")  # on one device

# Bytes of a trained number: as it is computed with, of its gradient, of a master copy in fp32.
NUMBERS: dict[Precision, tuple[int, int, int]] = {
    "fp32": (4, 4, 0),
    "mixed": (2, 2, 4),
    "bf16": (2, 2, 0),
}
# Bytes of the optimizer's states for a number; 8 bit: two, and two fp32 scales for every 256.
STATES: dict[Optimizer, float] = {"adamw": 8.0, "adamw-8bit": 2 + 2 * 4 / 256, "sgd": 0.0}
STEP_GRADIENT = 4  # DeepSpeed's optimizers step on gradients in fp32
COMPUTED = 2  # bytes of a weight as it enters a product

BUCKET = 50_000_000  # numbers that are sent between GPUs at once
PREFETCH = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What a trainer measures of itself: bytes of a number kept for the backward pass, of one that
    a norm keeps, of a logit with all that its loss needs, of everything there without a model.

    A norm in plain torch keeps its input in f32 and its result (Transformers'; Gemma's both in
    f32, 8 bytes); a fused one keeps the input alone, 2 bytes.
    """

    kept_bytes: float = 2.0
    norm_bytes: float = 6.0
    logit_bytes: float = 10.0  # bf16, f32, and a gradient in f32
    teacher_logit_bytes: float = 4.0
    overhead_bytes: int = 0


PLAIN = Constants()


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a model is trained. `batch` sequences of `length` tokens go through a GPU at once.

    `loss_rows` of them are turned into logits at a time, None for all. `recipe` is how a frozen
    body is stored, `rank` that of low-rank updates, `targets` what an adapter of ours changes, by
    the ends of names in Hugging Face (none: all linears). `tokens`: whose final states a teacher
    has left on disk, and blockwise, whose inputs of a block lie ready. On the grid everything is
    computed in f32, and bf16 is how weights are kept; `curvature`: modes that move integers
    hold on to what errors of their matrices cost. Raises `InvalidInputError`.
    """

    mode: Mode
    batch: int = 1
    length: int = 2048
    precision: Precision = "mixed"
    optimizer: Optimizer = "adamw"
    checkpointing: bool = True
    loss_rows: int | None = None
    curvature: bool = True
    rank: int = 16
    targets: tuple[str, ...] = ()
    recipe: str = "q4_0"
    tokens: int = 0
    gpus: int = 1
    zero: int = 0
    offload: Offload = "none"

    def __post_init__(self) -> None:
        sizes = (self.batch, self.length, self.rank, self.gpus, self.loss_rows or 1)
        if min(sizes) < 1 or self.tokens < 0 or not 0 <= self.zero <= 3:
            raise InvalidInputError("sizes of a training are at least 1, and ZeRO has stages 0-3")
        if self.mode in OURS and (self.gpus > 1 or self.zero or self.offload != "none"):
            raise InvalidInputError(
                f"{self.mode} trains on one device", hint="leave out --gpus, --zero and --offload"
            )
        if self.targets and self.mode != "adapter":
            raise InvalidInputError(
                f"{self.mode} changes every linear", where="--target", hint="--train adapter"
            )
        if self.mode == "qlora" and self.zero == 3:
            raise InvalidInputError(
                "ZeRO 3 does not divide packed weights", hint="--zero 2, or --train lora"
            )
        if self.offload != "none" and not self.zero:
            raise InvalidInputError("offload is a part of ZeRO", hint="add --zero 2 or --zero 3")
        if self.offload == "nvme" and self.zero < 3:
            raise InvalidInputError("only ZeRO 3 offloads to a disk", hint="--zero 3")

    @property
    def rows(self) -> int:
        """Tokens in a GPU at once."""
        return self.batch * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one component takes in one place: on each GPU, in the host for all of them, on disk."""

    component: str
    bytes: int
    place: Place = "device"
    basis: Basis = "arithmetic"
    note: str = ""


def costs(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme],
    training: Training,
    constants: Constants = PLAIN,
) -> Iterator[Cost]:
    """Every cost of a training off the grid. `schemes` is how a frozen body is stored."""
    yield from frozen(spec, schemes, training)
    yield from states(trained(spec, training), training)
    yield from rounded(spec, training)
    yield from activations(spec, training, constants)
    yield logits(spec, training, constants)
    yield from data(spec, training)
    if training.zero:
        yield from buffers(spec, training)


def trained(spec: ModelSpec, training: Training) -> int:
    """How many numbers are trained."""
    if training.mode == "full":
        return spec.parameters
    return sum(training.rank * sum(tensor.shape) for tensor in linears(spec))


def block_weights(spec: ModelSpec) -> int:
    """Weights of the largest layer."""
    sizes: Counter[str] = Counter()
    for tensor in spec.tensors():
        if tensor.name.startswith("layers."):
            sizes[tensor.name.split(".")[1]] += tensor.count
    return max(sizes.values())


def frozen(spec: ModelSpec, schemes: Mapping[str, Scheme], training: Training) -> Iterator[Cost]:
    """Weights that are not trained: none, all in bf16, or all as they are stored."""
    if training.mode == "full":
        return
    sizes: Counter[str] = Counter()
    for tensor in spec.tensors():
        plain = training.mode == "lora"
        size = COMPUTED * tensor.count if plain else schemes[tensor.name].bytes(tensor.shape)
        sizes["bf16" if plain else schemes[tensor.name].name] += size
    for name, size in sizes.items():
        yield from _placed_weights(f"weights.frozen.{name}", size, training)


def states(count: int, training: Training) -> Iterator[Cost]:
    """Weights, gradients, master copies and optimizer states of `count` trained numbers."""
    computed, gradient, master = NUMBERS[training.precision]
    yield from _placed_weights("weights.trained", computed * count, training)
    shared = training.gpus if training.zero >= 2 else 1
    if training.offload == "none" or training.zero < 2:  # else each goes to the host as it comes
        yield Cost(component="gradients", bytes=ceil(gradient * count / shared))
    optimizer = {
        "master": master * count,
        "optimizer": ceil(STATES[training.optimizer] * count),
        "gradients.step": STEP_GRADIENT * count if training.zero else 0,
    }
    notes = {
        "master": "an fp32 copy, for updates that bf16 would lose",
        "optimizer": f"the states of {training.optimizer}",
        "gradients.step": "in fp32, while the optimizer steps",
    }
    for component, size in optimizer.items():
        if size:
            yield _placed_states(component, size, notes[component], training)


def _placed_weights(component: str, size: int, training: Training) -> Iterator[Cost]:
    """Weights on every GPU; with ZeRO 3 a share on each, or in the host if they are offloaded."""
    if training.zero < 3:
        yield Cost(component=component, bytes=size)
    elif training.offload == "none":
        yield Cost(component=component, bytes=ceil(size / training.gpus), note="a share")
    else:
        yield Cost(component=component, bytes=size, place=_away(training))


def _placed_states(component: str, size: int, note: str, training: Training) -> Cost:
    if training.offload != "none":
        return Cost(component=component, bytes=size, place=_away(training), note=note)
    shared = training.gpus if training.zero else 1
    return Cost(component=component, bytes=ceil(size / shared), note=note)


def _away(training: Training) -> Place:
    return "disk" if training.offload == "nvme" else "host"


def rounded(spec: ModelSpec, training: Training) -> Iterator[Cost]:
    """Weights unpacked for a product."""
    if training.mode == "qlora":
        size = COMPUTED * max(tensor.count for tensor in linears(spec))
        yield Cost(component="weights.rounded", bytes=size, note="one matrix unpacked")


def activations(spec: ModelSpec, training: Training, constants: Constants) -> Iterator[Cost]:
    """What is kept for the backward pass, and what a layer's backward computes at once.

    With checkpointing, every layer's input and one layer's inside; without it all of them.
    """
    per_layer = [kept(layer, spec, constants) for layer in spec.layers]
    largest = max(per_layer)
    if training.checkpointing:
        inside, note = largest, "of one layer, computed again"
        size = training.rows * len(spec.layers) * spec.hidden * constants.kept_bytes
        yield Cost(component="activations.checkpoints", bytes=ceil(size), note="each layer's input")
    else:
        inside, note = sum(per_layer), f"of {len(spec.layers)} layers, without checkpointing"
    yield Cost(component="activations.layers", bytes=ceil(training.rows * inside), note=note)
    widest = max(layer.mlp.width for layer in spec.layers)
    flowing = (2 * spec.hidden + 3 * widest) * constants.kept_bytes
    yield Cost(
        component="activations.backward",
        bytes=ceil(training.rows * flowing),
        note="gradients on their way through a layer",
    )


def kept(layer: LayerSpec, spec: ModelSpec, constants: Constants) -> float:
    """Bytes that autograd keeps of one token in a layer, with fused attention.

    Products keep their input, the gate all four of its numbers; attention keeps queries, keys,
    values, its output, and one fp32 a head.
    """
    attention = layer.attention
    keys = 0 if layer.kv_source is not None else attention.kv_width
    normed = 2 * spec.hidden
    numbers = 2 * spec.hidden + 2 * attention.query_width + 2 * keys + 4 * layer.mlp.width
    if layer.post_norms:
        normed += 2 * spec.hidden
    if attention.qk_norm:
        normed += attention.query_width + keys
    if attention.value_norm:
        normed += keys
    if layer.experts is not None:
        experts = layer.experts
        normed += 3 * spec.hidden
        numbers += experts.used * (spec.hidden + 4 * experts.width)
    if spec.per_layer is not None:
        normed += spec.hidden
        numbers += spec.hidden + 4 * spec.per_layer.width
    return normed * constants.norm_bytes + numbers * constants.kept_bytes + 4 * attention.heads


def logits(spec: ModelSpec, training: Training, constants: Constants) -> Cost:
    """Logits and their loss, so many rows at a time; a teacher's beside them where one is told."""
    rows = min(training.loss_rows or training.rows, training.rows)
    each = constants.logit_bytes + (constants.teacher_logit_bytes if training.tokens else 0)
    note = f"{rows} rows of {spec.vocab} at once"
    return Cost(component="activations.logits", bytes=ceil(rows * spec.vocab * each), note=note)


def data(spec: ModelSpec, training: Training) -> Iterator[Cost]:
    """A teacher's final states, which lie ready."""
    size = 2 * training.tokens * spec.hidden
    if size:
        note = f"final states of {training.tokens} tokens in bf16"
        yield Cost(component="data.teacher", bytes=size, place="disk", note=note)


def buffers(spec: ModelSpec, training: Training) -> Iterator[Cost]:
    """What DeepSpeed sends between GPUs at once, and with ZeRO 3 the weights gathered for use."""
    computed = NUMBERS[training.precision][0]
    yield Cost(
        component="buffers.gradients", bytes=2 * BUCKET * computed, note="two buckets on their way"
    )
    if training.zero == 3:
        live = 2 * block_weights(spec) + PREFETCH
        note = "two layers gathered, and what is fetched ahead"
        yield Cost(component="buffers.weights", bytes=live * computed, note=note)
