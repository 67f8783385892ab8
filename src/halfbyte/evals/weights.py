"""The stored weights of two models, side by side: which are not what rounding explains, and how.

Each scheme has a distance that rounding alone reaches; a tensor further away than a few times that
is held against the known ways to get one wrong. Only the beginning of a large tensor is read. What
it is not: a proof of equality; a fault in later rows alone is left to the KL divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from halfbyte.formats.checkpoint import Source
from halfbyte.formats.paired import to_halves, to_pairs
from halfbyte.numerics.codec import decode
from halfbyte.numerics.qtensor import QTensor

ROWS = 1024
# |w - rounded| / |w| of normally distributed weights, rounded up: measured for those that `encode`
# writes, by their bits for the others.
ROUNDING = {
    "f32": 1e-6,
    "f16": 2.1e-4,
    "bf16": 1.7e-3,
    "q8_0": 0.006,
    "q6_k": 0.018,
    "q5_0": 0.05,
    "q5_1": 0.04,
    "q5_k": 0.04,
    "q4_0": 0.09,
    "q4_1": 0.08,
    "q4_k": 0.08,
    "iq4_nl": 0.08,
    "iq4_xs": 0.08,
    "q3_k": 0.17,
    "q2_k": 0.3,
    "nf4": 0.1,
    "int8": 0.01,
} | {
    f"{kind}-g{group}{scale}": distance
    for kind, group, distance in (
        ("int4", 32, 0.1), ("int4", 128, 0.12), ("uint4", 32, 0.09), ("uint4", 128, 0.11)
    )
    for scale in ("", "-f16")
}  # fmt: skip
MARGIN = 3.0
FLOOR = 0.01  # nearer than that is near in every scheme
# Schemes of blocks [scale(s), 16 bytes of two nibbles]: where the nibbles begin.
NIBBLES = {"q4_0": 2, "q4_1": 4, "iq4_nl": 2}

Explanation = tuple[str, Tensor, Tensor]  # in words; ours, repaired; what that should be


def weight_faults(model: Source, reference: Source) -> list[str]:
    """What is wrong with which tensors, tensors with the same fault in one sentence."""
    where: dict[str, list[str]] = {}
    theirs = {tensor.name: tensor.shape for tensor in reference.spec.tensors()}
    for tensor in model.spec.tensors():
        if theirs.get(tensor.name) == tensor.shape:
            fault = _fault(tensor.name, model, reference)
            if fault is not None:
                where.setdefault(fault, []).append(tensor.name)
    return [f"{_some(names)}: {fault}" for fault, names in where.items()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more tensors" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _fault(name: str, model: Source, reference: Source) -> str | None:
    head_dim = _rotated_head(name, model)
    q, other = (_beginning(source.tensor(name), head_dim or 1) for source in (model, reference))
    ours, theirs = decode(q), decode(other)
    limit = max(MARGIN * (ROUNDING[q.scheme.name] + ROUNDING[other.scheme.name]), FLOOR)
    if _distance(ours, theirs) <= limit:
        return None
    explanations = _of_vectors(ours, theirs) if ours.dim() == 1 else _of_matrices(q, ours, theirs)
    paired = _of_pairs(q, theirs, head_dim) if head_dim else ()
    for words, repaired, wanted in (*explanations, *paired):
        if _distance(repaired, wanted) <= limit:
            return words
    return f"{_distance(ours, theirs):.0%} away from the reference, which rounding does not explain"


def _rotated_head(name: str, model: Source) -> int | None:
    """The rows of a head that the rotation pairs up; None for a tensor without such rows."""
    if not name.endswith(("attn.q.weight", "attn.k.weight")):
        return None
    return model.spec.layers[int(name.split(".")[1])].attention.head_dim


def _beginning(q: QTensor, multiple: int) -> QTensor:
    """Up to `ROWS` rows, a whole number of heads; experts one below the other."""
    if len(q.shape) == 1:
        return q
    return q.rows(0, min(q.num_rows, max(ROWS // multiple, 1) * multiple))


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|."""
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def _of_vectors(ours: Tensor, theirs: Tensor) -> Iterator[Explanation]:
    yield "1 is missing (w where 1 + w is meant)", ours + 1, theirs
    yield "1 is added (1 + w where w is meant)", ours - 1, theirs
    if bool((ours == 1).all()):
        yield "all 1, as if it had been dropped", theirs, theirs


def _of_matrices(q: QTensor, ours: Tensor, theirs: Tensor) -> Iterator[Explanation]:
    yield "the rows stand one too late", ours[1:], theirs[:-1]
    yield "the rows stand one too early", ours[:-1], theirs[1:]
    if ours.shape[0] == ours.shape[1]:
        yield "transposed", ours.T, theirs
    if q.scheme.name in NIBBLES:
        for words, order in (("swapped", _swapped), ("interleaved", _split)):
            yield f"the nibbles of each block are {words}", decode(_reordered(q, order)), theirs
    factor = float((ours * theirs).sum() / theirs.square().sum())
    if abs(factor) > FLOOR:
        yield f"multiplied by {factor:.4g}", ours / factor, theirs


def _of_pairs(q: QTensor, theirs: Tensor, head_dim: int) -> Iterator[Explanation]:
    heads = q.shape[0] // head_dim
    for order in (to_halves, to_pairs):
        yield (
            "the rows of a head stand in the other order of rotation",
            decode(order(q, heads)),
            theirs,
        )


def _reordered(q: QTensor, order: Callable[[np.ndarray], np.ndarray]) -> QTensor:
    blocks = q.data.reshape(-1, q.scheme.block_bytes).copy()
    start = NIBBLES[q.scheme.name]
    blocks[:, start:] = order(blocks[:, start:])
    return QTensor(q.scheme, q.shape, blocks.reshape(q.data.shape))


def _swapped(packed: np.ndarray) -> np.ndarray:
    """The low half of every byte and the high one change places."""
    return (packed >> 4) | (packed << 4)


def _split(packed: np.ndarray) -> np.ndarray:
    """Weights 2i and 2i + 1 in byte i, to weights i and i + 16."""
    weights = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    low, high = np.split(weights, 2, axis=1)
    return low | (high << 4)
