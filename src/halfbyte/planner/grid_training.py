"""What training on the grid takes: weights whose rounding is part of the forward pass.

The ledger of `halfbyte distill`, whose computations are in f32: a trained weight is its place among
the integers (f32, or bf16 with little memory), beside the step of its group; its gradient is there
throughout a step. What is not trained stays packed. With checkpointing one layer's weights and
activations exist in f32 at a time. The last layer's way back is where most is there at once. An
adapter beside the model is trained likewise; the model is where it is mapped to, and its layers
come to the device as they are needed, decoded and without gradients.

Names and counts follow the trainer: `training/grid.py` (what a tensor keeps), `training/ops.py`
(what a layer keeps for its backward pass), `training/divergence.py` (logits), `training/heads.py`,
`training/low_rank.py` (an adapter).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod

from halfbyte.formats.lora_writing import updates_for
from halfbyte.planner.training import STATES, Cost, Training
from halfbyte.specs import LayerSpec, ModelSpec, Scheme, TensorSpec

F32 = 4
TABLES = ("embed.weight", "per_layer.embed.weight", "head.weight")
GROUPS = {"q6_k": 16}  # weights that share a step, where those are fewer than a block
ON_GRID = ("q8_0", "q4_0", "q6_k", "int4", "uint4")  # schemes that have integers to train
FOUR_BITS = ("q4_0", "int4", "uint4")  # places of these are kept in bf16 where memory is short
HEAD_KEPT = 1 << 25  # weights of a head that is kept in f32; else a slice of it is
HEAD_SLICE = 1 << 24
LOGITS = 1 << 20  # that exist at once, of each side
LOGIT_COPIES = 4  # capped, log-probabilities, the teacher's, probabilities
ROUNDING = 9  # bytes of a weight on the way back through its rounding, beside its gradient
DECODING = 6  # bytes of a weight that is being decoded, beside its f32
DECODED = 1 << 20  # weights that are at once
# f32 states of a row: final, normed, their gradient, the teacher's; one more where errors count
AFTER_LAYERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Numbers that are trained: places by their bytes, all others in f32, and what beside them is
    fixed but not packed (units of super-blocks)."""

    places: int = 0
    place_bytes: int = 0
    others: int = 0
    fixed_bytes: int = 0

    def __add__(self, other: Trained) -> Trained:
        return Trained(
            places=self.places + other.places,
            place_bytes=self.place_bytes + other.place_bytes,
            others=self.others + other.others,
            fixed_bytes=self.fixed_bytes + other.fixed_bytes,
        )

    @property
    def bytes(self) -> int:
        return self.place_bytes + F32 * self.others


def costs_on_grid(
    spec: ModelSpec, schemes: Mapping[str, Scheme], training: Training
) -> Iterator[Cost]:
    """Every cost of a training on the grid. `schemes` is how the result is stored."""
    trained = largest(spec, schemes, training)
    count = trained.places + trained.others
    adapting = training.mode == "adapter"
    note = "an adapter" if adapting else "places, steps, vectors"
    yield Cost(component="weights.trained", bytes=trained.bytes, note=note)
    yield Cost(
        component="weights.frozen",
        bytes=_frozen(spec, schemes, training),
        place="host" if adapting else "device",
        note="packed",
    )
    yield Cost(component="gradients", bytes=trained.bytes)
    yield Cost(
        component="optimizer",
        bytes=ceil(STATES[training.optimizer] * count),
        note=f"the states of {training.optimizer}",
    )
    if _weighs(training):
        size = _curvature(spec, schemes, training)
        yield Cost(
            component="curvature", bytes=size, note="of both sides of matrices, and of states"
        )
    yield from _passes(spec, training)
    if training.mode != "blockwise":
        yield from _predictions(spec, schemes, training)
    yield from _data(spec, training)


def largest(spec: ModelSpec, schemes: Mapping[str, Scheme], training: Training) -> Trained:
    """What is trained at a time: of all tensors, or of the largest layer."""
    if training.mode == "adapter":
        updates = updates_for(spec, rank=training.rank, alpha=1.0, targets=training.targets)
        return Trained(others=sum(prod(shape) for it in updates for shape in it.shapes))
    if training.mode != "blockwise":
        return _sum(spec, schemes, training, "")
    layers = [
        _sum(spec, schemes, training, f"layers.{index}.") for index in range(len(spec.layers))
    ]
    return max(layers, key=lambda layer: layer.bytes)


def _sum(
    spec: ModelSpec, schemes: Mapping[str, Scheme], training: Training, prefix: str
) -> Trained:
    total = Trained()
    for tensor in spec.tensors():
        if tensor.name.startswith(prefix):
            total += _of(tensor, schemes[tensor.name], training)
    return total


def _of(tensor: TensorSpec, scheme: Scheme, training: Training) -> Trained:
    if len(tensor.shape) == 1:
        return Trained(others=tensor.count)
    if not on_grid(tensor, scheme, training):
        return Trained()
    steps = tensor.count // GROUPS.get(scheme.name, scheme.block)
    fixed = F32 * steps if scheme.name in GROUPS else 0
    if training.mode == "scales":
        return Trained(others=steps, fixed_bytes=fixed)
    if training.mode == "qat-lora":
        rows, width = prod(tensor.shape[:-1]), tensor.shape[-1]
        return Trained(others=steps + training.rank * (rows + width), fixed_bytes=fixed)
    rough = training.precision == "bf16" and scheme.name.startswith(FOUR_BITS)
    size = (2 if rough else F32) * tensor.count
    return Trained(places=tensor.count, place_bytes=size, others=steps, fixed_bytes=fixed)


def on_grid(tensor: TensorSpec, scheme: Scheme, training: Training) -> bool:
    """Whether a tensor is trained among its integers, or by its steps."""
    if len(tensor.shape) == 1 or not scheme.name.startswith(ON_GRID):
        return False
    return training.mode == "qat" or tensor.name not in TABLES


def _frozen(spec: ModelSpec, schemes: Mapping[str, Scheme], training: Training) -> int:
    """Integers that stay packed (with four bits more where a part of a step is kept), units; all
    of a model that an adapter stands beside."""
    if training.mode == "adapter":
        return sum(schemes[tensor.name].bytes(tensor.shape) for tensor in spec.tensors())
    total = largest(spec, schemes, training).fixed_bytes
    if training.mode in ("scales", "qat-lora"):
        for tensor in spec.tensors():
            scheme = schemes[tensor.name]
            if on_grid(tensor, scheme, training):
                total += scheme.bytes(tensor.shape)
                total += tensor.count // 2 if training.mode == "qat-lora" else 0
    return total


def _weighs(training: Training) -> bool:
    """Whether it knows what errors of weights and states cost."""
    return training.mode in ("qat", "qat-lora", "blockwise") and training.curvature


def _curvature(spec: ModelSpec, schemes: Mapping[str, Scheme], training: Training) -> int:
    """What errors of the layers' matrices cost, a square for each side or its diagonal; and a
    square for states."""
    whole = training.mode == "qat" and training.precision != "bf16"
    power, sizes = 2 if whole else 1, Counter[str]()
    for tensor in spec.tensors():
        if tensor.name.startswith("layers.") and on_grid(tensor, schemes[tensor.name], training):
            stack, rows, width = (1, *tensor.shape)[-3:]
            sizes[tensor.name.split(".")[1]] += F32 * stack * (rows**power + width**power)
    matrices = max(sizes.values(), default=0) if training.mode == "blockwise" else sizes.total()
    return matrices + F32 * spec.hidden**2


def _passes(spec: ModelSpec, training: Training) -> Iterator[Cost]:
    """What a forward leaves for the way back, and the most that is there for a moment.

    Where layers are computed again, one of them is there for a moment. Logits are gone when the way
    back begins, so of the two the larger counts.
    """
    rows, matrices = training.rows, _matrices(spec)
    beside = training.mode == "adapter"
    kept = [F32 * rows * kept_on_grid(layer, spec, beside=beside) for layer in spec.layers]
    on_the_way = _beside if beside else _back
    back = max(on_the_way(spec, rows, *layer) for layer in zip(kept, matrices, strict=True))
    logits = 0 if training.mode == "blockwise" else _logits(spec, rows)
    if training.mode != "blockwise" and training.checkpointing:
        size = F32 * rows * spec.hidden * len(spec.layers)
        yield Cost(component="activations.checkpoints", bytes=size, note="each layer's input")
    elif training.mode != "blockwise":
        rounded = F32 * sum(matrices)
        yield Cost(component="weights.rounded", bytes=rounded, note="of all layers")
        yield Cost(component="activations.layers", bytes=sum(kept), note="of all layers")
        back = on_the_way(spec, rows, 0, 0)
    note = "logits and their loss" if logits > back else "a layer on its way back"
    yield Cost(component="activations.moment", bytes=max(back, logits), note=note)


def _matrices(spec: ModelSpec) -> list[int]:
    """Weights of each layer."""
    counts = Counter[str]()
    for tensor in spec.tensors():
        if tensor.name.startswith("layers.") and len(tensor.shape) > 1:
            counts[tensor.name.split(".")[1]] += tensor.count
    return [counts[str(index)] for index in range(len(spec.layers))]


def _back(spec: ModelSpec, rows: int, kept: int, matrices: int) -> int:
    """A layer on its way back: what it kept and its matrices in f32, which give way to their
    gradients; those go through the rounding one after another when the rest is gone."""
    largest_ = max(tensor.count for tensor in spec.tensors() if tensor.name.startswith("layers."))
    widest = max(layer.mlp.width for layer in spec.layers)
    flowing = F32 * (largest_ + rows * (spec.hidden + widest))
    return F32 * matrices + max(kept + flowing, ROUNDING * largest_)


def _beside(spec: ModelSpec, rows: int, kept: int, matrices: int) -> int:
    """A layer on its way back that is not trained itself: its matrices in f32 have no gradients,
    but the last of them is just decoded where nothing is kept yet."""
    largest_ = max(tensor.count for tensor in spec.tensors() if tensor.name.startswith("layers."))
    widest = max(layer.mlp.width for layer in spec.layers)
    flowing = F32 * rows * (spec.hidden + widest)
    decoding = DECODING * min(largest_, DECODED) if matrices else 0
    return F32 * matrices + max(kept + flowing, decoding)


def _logits(spec: ModelSpec, rows: int) -> int:
    return LOGIT_COPIES * F32 * spec.vocab * min(rows, max(1, LOGITS // spec.vocab))


def kept_on_grid(layer: LayerSpec, spec: ModelSpec, *, beside: bool = False) -> int:
    """Numbers that a layer keeps of one token for the way back; `beside`: for an adapter's alone.

    A norm its input and one number a row, a product its input, the gate all four of its own,
    attention queries, keys, values, its output and one number a head, a rotation its angles.
    """
    attention = layer.attention
    own = layer.kv_source is None
    keys = attention.kv_width if own else 0
    numbers = 2 * spec.hidden + 2  # norms before both halves
    numbers += 2 * spec.hidden + 4 * layer.mlp.width  # inputs of products, the gate
    numbers += 2 * attention.query_width + 2 * keys + attention.heads
    numbers += (2 if own else 1) * attention.head_dim
    if layer.post_norms:
        numbers += 2 * spec.hidden + 2
    if attention.qk_norm:
        numbers += attention.query_width + attention.heads + keys
    if attention.value_norm and not attention.shares_kv:
        numbers += keys
    if layer.scalar and not beside:
        numbers += spec.hidden
    if layer.experts is not None:
        experts = layer.experts
        numbers += 3 * spec.hidden + experts.used * (2 * spec.hidden + 4 * experts.width)
    if spec.per_layer is not None:
        numbers += 2 * spec.hidden + 4 * spec.per_layer.width
    return numbers


def _predictions(
    spec: ModelSpec, schemes: Mapping[str, Scheme], training: Training
) -> Iterator[Cost]:
    """Heads, the teacher's and the student's, logits, and the states they are made of."""
    table = spec.vocab * spec.hidden
    stored = F32 * (table if table <= HEAD_KEPT else HEAD_SLICE)
    trained = training.mode == "qat" and schemes[spec.head_name].name.startswith(ON_GRID)
    # Trained: as it comes out of the rounding, its gradient from the logits and from the rows read.
    own = (3 * F32 + (0 if spec.tied_head else F32)) * table if trained else stored
    note = "the teacher's and the student's; trained, with its gradient"
    yield Cost(component="weights.heads", bytes=stored + own, note=note)
    yield Cost(
        component="activations.states",
        bytes=(AFTER_LAYERS + _weighs(training)) * F32 * training.rows * spec.hidden,
        note="final states, and the teacher's",
    )


def _data(spec: ModelSpec, training: Training) -> Iterator[Cost]:
    """What lies ready: the inputs of a layer on both ways, or a teacher's final states."""
    size = F32 * training.tokens * spec.hidden
    if not size:
        return
    if training.mode == "blockwise":
        note = f"{training.tokens} tokens before a layer, the original's and the student's"
        yield Cost(component="data.blocks", bytes=2 * size, place="host", note=note)
    else:
        note = f"final states of {training.tokens} tokens"
        yield Cost(component="data.teacher", bytes=size, place="disk", note=note)
