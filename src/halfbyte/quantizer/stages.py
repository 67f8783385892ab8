"""The finished parts of a long job, in a folder beside its output, so that a kill costs one part.

A part is the stored tensors of one layer (or of what comes before or after the layers). It is
written whole or not at all, and never changes. The folder says what job it belongs to: all that
decides the result. A folder of another job is emptied; the same job, started again, goes on where
it was and ends in the same bytes.

What it is not: a format for others; it is gone when the output is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from halfbyte.formats.atomic import atomic_file
from halfbyte.formats.checkpoint import Around, Source
from halfbyte.formats.jobs import Job, claim
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import ModelSpec, Scheme

OVERHEAD = 4096  # bytes of a part beside its tensors', and of each tensor


def stage_of(name: str) -> str:
    """The part that a tensor belongs to: "layers.3", or "embed" before and "head" after them."""
    if name.startswith("layers."):
        return ".".join(name.split(".")[:2])
    return "head" if name in ("norm.weight", "head.weight") else "embed"


class Stages:
    """The parts of one job in `folder`. `schemes` are those that the job will store tensors in."""

    def __init__(
        self,
        folder: Path,
        *,
        spec: ModelSpec,
        schemes: Mapping[str, Scheme],
        job: Job,
    ) -> None:
        self.folder = folder
        self._schemes = schemes
        self._shapes = {tensor.name: tensor.shape for tensor in spec.tensors()}
        claim(folder, job)

    @property
    def names(self) -> list[str]:
        """All parts, in the order of the forward pass."""
        return list(dict.fromkeys(stage_of(name) for name in self._shapes))

    @property
    def complete(self) -> bool:
        return all(map(self.has, self.names))

    def has(self, stage: str) -> bool:
        return self._place(stage).is_file()

    def save(self, stage: str, tensors: Mapping[str, QTensor]) -> None:
        """Raises `DoesNotFitError` where the disk is full; what was saved before stays."""
        assert set(tensors) == set(self.members(stage)), stage
        size = sum(q.nbytes + OVERHEAD for q in tensors.values())
        with atomic_file(self._place(stage), size=size) as file:
            np.savez(file, allow_pickle=False, **{name: q.data for name, q in tensors.items()})

    def load(self, stage: str) -> Iterator[tuple[str, QTensor]]:
        """The tensors of a part, in the order of the forward pass."""
        with np.load(self._place(stage)) as stored:
            for name in self.members(stage):
                yield name, QTensor(self._schemes[name], self._shapes[name], stored[name])

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def members(self, stage: str) -> list[str]:
        """The names of a part's tensors."""
        return [name for name in self._shapes if stage_of(name) == stage]

    def _place(self, stage: str) -> Path:
        return self.folder / f"{stage}.npz"


class Finished(Around):
    """The source of a job that is done: the parts, and all else from where the model came."""

    def __init__(self, source: Source, stages: Stages, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(source)
        self._stages = stages
        self.schemes = schemes

    def tensor(self, name: str) -> QTensor:
        return dict(self._stages.load(stage_of(name)))[name]

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for stage in self._stages.names:
            yield from self._stages.load(stage)
