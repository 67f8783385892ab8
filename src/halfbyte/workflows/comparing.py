"""A model before and after quantization, in one table: memory, latency, throughput, fidelity.

Each timing is a process of its own, so that a peak of memory is that model's and nobody else's, and
the models take turns: machines drift, so what counts are medians of rounds. Fidelity is measured
here, against the first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from halfbyte.errors import HalfbyteError, InvalidInputError
from halfbyte.evals.fidelity import Fidelity
from halfbyte.evals.texts import Reading
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.quantizer.opening import open_source
from halfbyte.specs import LoadOptions
from halfbyte.workflows.evaluating import Evaluation

PROMPT, DECODE = 512, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model: bytes as stored, in memory and at the peak; seconds; and what was measured.

    `texts` are against the base; of the base itself there are none.
    """

    name: str
    parameters: int
    stored_bytes: int
    weights_bytes: int
    peak_bytes: int
    load_s: float
    token_s: float
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    ops: str
    texts: Sequence[Fidelity] = ()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / self.parameters


def compare(
    base: str,
    others: Sequence[str],
    *,
    texts: Mapping[str, Path],
    reading: Reading,
    rounds: int = 2,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> list[Side]:
    """The base and the others, in this order. Without `texts` our own are read."""
    options = options or LoadOptions()
    names = [base, *others]
    if len(set(names)) < len(names):
        raise InvalidInputError("a model is named twice")
    sources = {name: open_source(name) for name in names}
    fidelity: dict[str, Sequence[Fidelity]] = {base: ()}
    for name in others:
        evaluation = Evaluation(name, against=base, options=options)
        found = evaluation.measure(texts or evaluation.own_texts, reading, progress=progress)
        fidelity[name] = found.texts
    prompt = min(PROMPT, *(source.spec.context // 2 for source in sources.values()))
    timed = [{name: _timed(name, prompt, options) for name in names} for _ in range(rounds)]
    return [
        _side(name, sources[name], [turn[name] for turn in timed], fidelity[name]) for name in names
    ]


def _timed(model: str, prompt: int, options: LoadOptions) -> dict[str, Any]:
    """What `bench` says of a model, in a process of its own."""
    command = [sys.executable, "-m", "halfbyte", "bench", model, "--json", "--depth", "0"]
    command += ["--prefill", str(prompt), "--decode", str(DECODE), "--kv", options.kv]
    command += ["--device", options.device, "--dtype", options.dtype]
    command += ["--threads", str(options.threads)] if options.threads else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HalfbyteError(f"could not be timed:\n{done.stderr.strip()}", where=model)
    return json.loads(done.stdout)


def _side(
    name: str, source: Source, turns: Sequence[Mapping[str, Any]], texts: Sequence[Fidelity]
) -> Side:
    def middle(field: str) -> float:
        return median(turn[field] for turn in turns)

    def row(kind: str, field: str) -> float:
        rows = [r for turn in turns for r in turn["rows"] if r["test"].startswith(kind)]
        return median(r[field] for r in rows)

    return Side(
        name=name,
        parameters=source.spec.parameters,
        stored_bytes=sum(source.schemes[t.name].bytes(t.shape) for t in source.spec.tensors()),
        weights_bytes=int(middle("weights_bytes")),
        peak_bytes=int(middle("peak_bytes")),
        load_s=middle("load_s"),
        token_s=row("decode@", "median_s"),
        prompt_tokens_per_s=row("prefill@", "tokens_per_s"),
        decode_tokens_per_s=row("decode@", "tokens_per_s"),
        ops=turns[0]["ops"],
        texts=texts,
    )
