"""What a distillation needs before it trains: windows to learn from, and where to start.

Each is made once, in the order of need; what takes long is kept in the job's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte import __version__
from halfbyte.errors import InvalidInputError
from halfbyte.evals.differences import vocabulary_differences
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.jobs import claim
from halfbyte.formats.lora_writing import updates_for
from halfbyte.formats.manifest import check_sizes
from halfbyte.formats.progress import Progress
from halfbyte.kernels.choice import choose, oracle
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.calibrate import Calibration, Reader, Sampling
from halfbyte.quantizer.calibrated import quantized
from halfbyte.quantizer.pipeline import refuse_decoded, schemes_of
from halfbyte.quantizer.quantization import Quantization
from halfbyte.quantizer.stages import Stages
from halfbyte.specs import LowRankSpec, Recipe, Scheme, recipe_of
from halfbyte.training.fisher import Gathered, gathered
from halfbyte.training.generated import generated
from halfbyte.training.samples import Passage, SampleReader, Samples, hashes
from halfbyte.workflows.artefacts import check_storable
from halfbyte.workflows.asking import Distilling
from halfbyte.workflows.merging import original

CALIBRATED = 256  # windows of the data by which the start is quantized, where none is given
OWN_PROMPTS = 0.5  # of what the model says itself, the share that answers somebody


class Material:
    """Of a model at `place`, for a result at `target`."""

    def __init__(
        self, place: Path, target: Path, asked: Distilling, progress: Progress | None
    ) -> None:
        self.place, self._asked, self._progress = place, asked, progress
        self._opened = original(place, asked.merged)
        self.original: Source = self._opened.source
        self.folder = target.with_name(f"{target.name}.work")
        if self.original.assets is None:
            raise InvalidInputError("has no tokenizer to read texts with", where=place)
        self._assets = self.original.assets
        _refuse_misasked(asked, self.original.spec.context)
        self.recipe: Recipe = recipe_of(asked.recipe)
        self.schemes = self._schemes_for(target)
        self.oracle = oracle(self.original.spec, asked.device, threads=asked.threads)
        self.weights = self._opened.weights()

    def _schemes_for(self, target: Path) -> Mapping[str, Scheme]:
        """How the tensors of the result are stored; beside an adapter, those of the start."""
        if self._asked.mode == "adapter":
            if target.suffix == ".gguf":
                raise InvalidInputError("an adapter is a directory", where=f"-o {target}")
            return self.start.schemes
        if self._is_quantized:
            raise InvalidInputError(
                "is quantized; what it was made from is what its four-bit form learns from",
                where=self.place,
                hint="name the original checkpoint, or --mode adapter",
            )
        schemes = schemes_of(self.original, self.recipe)
        refuse_decoded(self._opened.checkpoint, schemes)
        check_storable(self.original.spec, schemes, target)
        return schemes

    @cached_property
    def updates(self) -> Sequence[LowRankSpec]:
        """What an adapter changes, if one is trained."""
        asked = self._asked
        if asked.mode != "adapter":
            return ()
        alpha = asked.rank if asked.alpha is None else asked.alpha
        return updates_for(self.original.spec, rank=asked.rank, alpha=alpha, targets=asked.targets)

    @property
    def _is_quantized(self) -> bool:
        return not all(scheme.is_float for scheme in self.original.schemes.values())

    @property
    def body(self) -> Path:
        """The file that an adapter is trained for: the start, or the model if that is quantized."""
        if self._asked.start is not None:
            return self._asked.start
        if not self._is_quantized:
            raise InvalidInputError(
                "an adapter is trained beside a model that is quantized",
                where="--mode adapter",
                hint="name its file with --start",
            )
        return self.place

    @property
    def identity(self) -> dict[str, Any]:
        """What everything that is made here depends on."""
        return {
            "halfbyte": __version__,
            "weights": self.weights,
            "schemes": {name: scheme.name for name, scheme in self.schemes.items()},
            # Sums may be ordered by both.
            "device": self.oracle.device.partition(":")[0],
            "threads": torch.get_num_threads(),
        }

    @cached_property
    def _reader(self) -> SampleReader:
        return SampleReader(self._assets)

    @property
    def notes(self) -> list[str]:
        """What was left out of the data that was read."""
        return [
            f"{name}: {count} prompts were longer than a window; what came after was left out"
            for name, count in sorted(self._reader.too_long.items())
        ]

    @cached_property
    def lessons(self) -> tuple[Samples, Samples]:
        """What is learned, and what is held apart to measure on the way."""
        asked, reader = self._asked, self._reader
        parts: list[Samples] = []
        if asked.data or asked.own_tokens:
            own = self._own(reader) if asked.own_tokens else None
            parts.append(reader.read(asked.data, asked.mix, own))
        if asked.task:
            mix = replace(asked.mix, prompts=0.0)
            parts.append(reader.read(asked.task, mix, supervised=asked.task_share))
        if not parts:
            raise InvalidInputError("nothing to learn from", where="--data", hint="name a text")
        found = Samples.joined(parts)
        if len(found) < asked.held + asked.batch:
            raise InvalidInputError(
                f"{len(found)} windows of {asked.mix.length} tokens are too few for "
                f"{asked.held} that are held apart and a batch of {asked.batch}",
                where="--data",
                hint="more text, or a smaller --window or --batch",
            )
        Reader(self._assets).refuse(self._calibration(found), asked.held_out)
        return found.split(asked.held)

    def _calibration(self, samples: Samples) -> Calibration:
        asked = self._asked
        return Calibration(
            windows=samples.token_ids.tolist(),
            files=hashes([*asked.data, *asked.task]),
            sampling=Sampling(samples=len(samples), window=asked.mix.length, seed=asked.mix.seed),
        )

    def _own(self, reader: SampleReader) -> list[Passage]:
        """What the original says itself; kept beside the output."""
        asked, longest, folder = self._asked, self._asked.mix.length, self.folder / "own"
        prompts = self._prompts(reader, max(1, asked.own_tokens // longest))
        claim(
            folder,
            {
                "halfbyte": __version__,
                "weights": self.weights,
                "device": self.oracle.device.partition(":")[0],
                "prompts": digest(prompts),
                "asked": [longest, asked.seed],
            },
        )
        said = generated(
            self._runtime,
            prompts,
            folder=folder,
            longest=longest,
            stop_ids=reader.stop_ids,
            closing=reader.closing,
            seed=asked.seed,
            progress=self._progress,
        )
        return [reader.answered(p, a, asked.mix.prompts) for p, a in said]

    def _prompts(self, reader: SampleReader, count: int) -> list[list[int]]:
        """What the original is asked: half of it in conversations, if the data has some."""
        asked = self._asked
        chats = [file for file in asked.data if file.name.endswith((".jsonl", ".jsonl.gz"))]
        asking = round(OWN_PROMPTS * count) if chats else 0
        prompts: list[list[int]] = []
        for index, file in enumerate(chats):
            prompts += reader.prompts(file, -(-asking // len(chats)), asked.seed + index)
        return [*prompts, *([reader.beginning or [0]] * (count - len(prompts)))]

    def _runtime(self) -> Decoder:
        """The original as it runs."""
        asked = self._asked
        return load(self.original, choose(self.original.spec, asked.device, threads=asked.threads))

    @cached_property
    def start(self) -> Source:
        if self._asked.mode == "adapter":
            return self._given(self.body)
        if self._asked.start is not None:
            return self._of_recipe(self._asked.start)
        taught = self.lessons[0]
        windows = taught.token_ids[: min(CALIBRATED, len(taught)), :-1].tolist()
        calibration = Calibration(
            windows=windows,
            files=hashes([*self._asked.data, *self._asked.task]),
            sampling=Sampling(samples=len(windows), window=taught.length),
        )
        job = {"windows": digest(windows), **self.identity}
        stages = Stages(
            self.folder / "start", spec=self.original.spec, schemes=self.schemes, job=job
        )
        wanted = Quantization(
            source=self.original,
            schemes=self.schemes,
            method="yaqa",
            calibration=calibration,
            stages=stages,
            device=self.oracle.device,
        )
        return quantized(wanted, self._progress)

    def gathered(self, start: Mapping[str, QTensor], *, whole: bool) -> Gathered:
        """What errors of matrices cost, by some of the windows that are learned from."""
        taught = self.lessons[0]
        windows = taught.token_ids[: self._asked.curvature, :-1].tolist()
        own = {"windows": digest(windows), "start": hash_of(start), "whole": whole}
        return gathered(
            self.original,
            start,
            windows,
            self.folder / "forms",
            whole=whole,
            job={**own, **self.identity},
            device=self.oracle.device,
            progress=self._progress,
        )

    def _given(self, path: Path) -> Source:
        check_sizes(path)
        start, spec = read(path), self.original.spec
        if start.spec.vocab != spec.vocab:
            raise InvalidInputError(
                f"has a vocabulary of {start.spec.vocab} tokens, the model one of {spec.vocab}",
                where=path,
                hint="--start is a quantized form of the same model",
            )
        wanted = {tensor.name: tensor.shape for tensor in spec.tensors()}
        if {tensor.name: tensor.shape for tensor in start.spec.tensors()} != wanted:
            raise InvalidInputError("has other tensors than the model", where=path)
        if start.assets is not None:
            for difference in vocabulary_differences(start.assets, self._assets):
                raise InvalidInputError(
                    f"has another vocabulary than the model: {difference}",
                    where=path,
                    hint="--start is a quantized form of the same model",
                )
        return start

    def _of_recipe(self, path: Path) -> Source:
        start = self._given(path)
        for name, scheme in self.schemes.items():
            if start.schemes[name] != scheme:
                raise InvalidInputError(
                    f"stores {name} as {start.schemes[name].name}, the recipe as {scheme.name}",
                    where=path,
                    hint="quantize it by the same --recipe",
                )
        return start

    def merged(self) -> dict[str, Any]:
        """What a manifest says of the adapters in the original, if there are some."""
        return {"merged": self._opened.facts()} if self._asked.merged else {}

    def learned_from(self) -> dict[str, Any]:
        """What a manifest says of the windows."""
        files = hashes([*self._asked.data, *self._asked.task])
        return self.lessons[0].facts(files, self._asked.mix)


def _refuse_misasked(asked: Distilling, context: int) -> None:
    """What cannot be, whatever the model's weights."""
    if asked.mix.length > context:
        raise InvalidInputError(f"is beyond the context of {context} tokens", where="--window")
    if asked.mode != "adapter" and (asked.targets or asked.alpha is not None):
        raise InvalidInputError(
            "says what an adapter is",
            where="--target" if asked.targets else "--alpha",
            hint="add --mode adapter",
        )
    if asked.mode == "blockwise" and asked.task:
        raise InvalidInputError(
            "has layers learn what the original's do, and no task",
            where="--mode blockwise",
            hint="another --mode, or --data instead of --task-data",
        )


def hash_of(tensors: Mapping[str, QTensor]) -> str:
    """Of what is stored."""
    found = hashlib.sha256()
    for q in tensors.values():
        found.update(np.ascontiguousarray(q.data).data)
    return found.hexdigest()


def digest(values: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()
