"""What tells one model from another whatever its weights are stored in: the hash of its vectors.

Norms, biases and scalars are kept exactly by every recipe and export, so a checkpoint, its GGUF and
its four-bit form have one fingerprint, and a model that was trained on, norms and all, has another.
A drafter carries that of the target it was trained for. It detects mix-ups; adapters merged into
the matrices alone go unnoticed.
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import Source
from halfbyte.numerics.qtensor import QTensor


def fingerprint(source: Source) -> str:
    """32 hexadecimal digits; reads the vectors."""
    digest = sha256()
    for tensor in source.spec.tensors():
        if len(tensor.shape) == 1:
            digest.update(tensor.name.encode())
            digest.update(_f32(source.tensor(tensor.name)).tobytes())
    return digest.hexdigest()[:32]


def check_target(drafter: Source, target: Source) -> None:
    """Raises `InvalidInputError` for a drafter that says it was trained for another target."""
    made_for = None if drafter.spec.drafter is None else drafter.spec.drafter.target
    if made_for is not None and made_for != fingerprint(target):
        raise InvalidInputError(
            f"this is the drafter of another target: it was trained for {made_for[:8]}, "
            f"this model is {fingerprint(target)[:8]}",
            hint="train one for this model: halfbyte draft train",
        )


def _f32(vector: QTensor) -> np.ndarray:
    stored = vector.data.reshape(-1)
    if vector.scheme.name == "bf16":
        return (stored.view("<u2").astype("<u4") << 16).view("<f4")
    return stored.view({"f32": "<f4", "f16": "<f2"}[vector.scheme.name]).astype("<f4")
