"""Where a run stands, on the disk: written whole or not at all, so that a kill costs minutes.

A checkpoint is named arrays and a few numbers. Of random numbers and places in the data nothing is
kept: both are functions of the seed and the step. What is restored is bit for bit what was saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import IntegrityError
from halfbyte.formats.atomic import atomic_file

OVERHEAD = 4096  # bytes of a file beside its arrays', and of each array

Facts = Mapping[str, float]
FACTS = "facts."


def save(path: Path, tensors: Mapping[str, Tensor], facts: Facts) -> None:
    """Raises `DoesNotFitError` where the disk is full; what was there before stays."""
    arrays = {name: _bytes(tensor) for name, tensor in tensors.items()}
    arrays |= {FACTS + name: np.array(value) for name, value in facts.items()}
    size = OVERHEAD + sum(array.nbytes + OVERHEAD for array in arrays.values())
    with atomic_file(path, size=size) as file:
        np.savez(file, allow_pickle=False, **arrays)


def restore(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Fills the tensors from a file; returns its facts.

    Raises `IntegrityError` for a file of other tensors.
    """
    with np.load(path) as stored:
        names = {name for name in stored.files if not name.startswith(FACTS)}
        if names != set(tensors):
            raise IntegrityError(
                f"has other tensors: {', '.join(sorted(names ^ set(tensors))[:3])} ...",
                where=path,
                hint="remove the folder to begin anew",
            )
        for name, tensor in tensors.items():
            _fill(tensor, stored[name], path)
        return {
            name.removeprefix(FACTS): float(stored[name])
            for name in stored.files
            if name.startswith(FACTS)
        }


def _bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor of any type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _fill(tensor: Tensor, stored: np.ndarray, path: Path) -> None:
    if stored.nbytes != tensor.nbytes:
        raise IntegrityError(f"{stored.nbytes} bytes for a tensor of {tensor.nbytes}", where=path)
    given = torch.from_numpy(stored).view(tensor.dtype).reshape(tensor.shape)
    with torch.no_grad():
        tensor.copy_(given)
