"""What a distillation needs before it trains: windows to learn from, and where to start.

Each is made once, in the order of need; what takes long is kept in the job's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from halfbyte import __version__
from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.manifest import check_sizes, weights_hash
from halfbyte.formats.progress import Progress
from halfbyte.kernels.choice import choose, oracle
from halfbyte.models.load import load
from halfbyte.quantizer.blockwise import Blockwise
from halfbyte.quantizer.calibrate import Calibration, Reader, Sampling
from halfbyte.quantizer.pipeline import refuse_decoded, schemes_of
from halfbyte.quantizer.stages import Finished, Stages
from halfbyte.specs import Recipe, Scheme, recipe_of
from halfbyte.training.generated import generated, restore, save
from halfbyte.training.samples import Passage, SampleReader, Samples, hashes
from halfbyte.workflows.artefacts import check_storable
from halfbyte.workflows.asking import Distilling

CALIBRATED = 256  # windows of the data by which the start is quantized, where none is given
OWN_PROMPTS = 0.5  # of what the model says itself, the share that answers somebody


class Material:
    """Of a model at `place`, for a result at `target`."""

    def __init__(
        self, place: Path, target: Path, asked: Distilling, progress: Progress | None
    ) -> None:
        self._place, self._asked, self._progress = place, asked, progress
        self.original = read(place)
        self.folder = target.with_name(f"{target.name}.work")
        if self.original.assets is None:
            raise InvalidInputError("has no tokenizer to read texts with", where=place)
        self._assets = self.original.assets
        if asked.mix.length > self.original.spec.context:
            raise InvalidInputError(
                f"is beyond the context of {self.original.spec.context} tokens", where="--window"
            )
        self.recipe: Recipe = recipe_of(asked.recipe)
        self.schemes: Mapping[str, Scheme] = schemes_of(self.original, self.recipe)
        refuse_decoded(self.original, self.schemes)
        check_storable(self.original.spec, self.schemes, target)
        self.oracle = oracle(self.original.spec, asked.device, threads=asked.threads)
        self.weights = weights_hash(place)

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
    def lessons(self) -> tuple[Samples, Samples]:
        """What is learned, and what is held apart to measure on the way."""
        asked, reader = self._asked, SampleReader(self._assets)
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
        asked, path = self._asked, self.folder / "own.json"
        longest = asked.mix.length
        count = max(1, asked.own_tokens // longest)
        chats = [file for file in asked.data if file.name.endswith((".jsonl", ".jsonl.gz"))]
        asking = round(OWN_PROMPTS * count) if chats else 0
        prompts: list[list[int]] = []
        for index, file in enumerate(chats):
            prompts += reader.prompts(file, -(-asking // len(chats)), asked.seed + index)
        prompts += [reader.beginning or [0]] * (count - len(prompts))
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            ops = choose(self.original.spec, asked.device, threads=asked.threads)
            said = generated(
                load(self.original, ops),
                prompts,
                longest=longest,
                stop_ids=reader.stop_ids,
                closing=reader.closing,
                seed=asked.seed,
                progress=self._progress,
            )
            save(path, said)
        return [reader.answered(p, a, asked.mix.prompts) for p, a in restore(path)]

    @cached_property
    def start(self) -> Source:
        if self._asked.start is not None:
            return self._given(self._asked.start)
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
        blockwise = Blockwise(
            self.original,
            self.schemes,
            calibration,
            stages,
            method="gptq",
            device=self.oracle.device,
        )
        blockwise.run(self._progress)
        return Finished(self.original, stages, self.schemes)

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
        for name, scheme in self.schemes.items():
            if start.schemes[name] != scheme:
                raise InvalidInputError(
                    f"stores {name} as {start.schemes[name].name}, the recipe as {scheme.name}",
                    where=path,
                    hint="quantize it by the same --recipe",
                )
        return start

    def learned_from(self) -> dict[str, Any]:
        """What a manifest says of the windows."""
        files = hashes([*self._asked.data, *self._asked.task])
        return self.lessons[0].facts(files, self._asked.mix)


def digest(values: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()
