"""An adapter of ours as a directory in PEFT's form: every update of one rank and one alpha.

Its modules bear Hugging Face's names, behind the prefix that text models have; the targets are the
ends of these names, as PEFT writes them, and an update is there for every linear that they mean.
What it writes, `lora.py` reads, and PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import InvalidInputError
from halfbyte.families import family_of
from halfbyte.formats import safetensors
from halfbyte.formats.atomic import write_file
from halfbyte.formats.lora import PARTS, PREFIX, WEIGHTS
from halfbyte.formats.lora_config import CONFIG
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import LowRankSpec, ModelSpec, linears

MODEL = "model."


def updates_for(
    spec: ModelSpec, *, rank: int, alpha: float, targets: Sequence[str] = ()
) -> list[LowRankSpec]:
    """What an adapter changes whose targets are so called in Hugging Face: all linears by default.

    Raises `InvalidInputError` for a target that the model has not.
    """
    modules = _modules(spec)
    ends = sorted({_end(module) for module in modules.values()})
    unknown = [target for target in targets if target not in ends]
    if unknown:
        raise InvalidInputError(
            f"this model has no {', '.join(unknown)}", where="--target", hint=", ".join(ends)
        )
    return [
        LowRankSpec(
            weight=tensor.name,
            inputs=tensor.shape[1],
            outputs=tensor.shape[0],
            rank=rank,
            scale=alpha / rank,
        )
        for tensor in linears(spec)
        if not targets or _end(modules[tensor.name]) in targets
    ]


def write_adapter(
    directory: Path,
    spec: ModelSpec,
    updates: Sequence[LowRankSpec],
    pairs: Mapping[str, tuple[QTensor, QTensor]],
    *,
    base: str,
) -> None:
    """Write the A and B of each update into a directory that is there; `base` is the model's name.

    The updates are of one rank and scale, and are all that their targets mean.
    """
    modules, first = _modules(spec), updates[0]
    named = {
        f"{PREFIX}{modules[update.weight]}{part}": q
        for update in updates
        for part, q in zip(PARTS, pairs[update.weight], strict=True)
    }
    safetensors.write(
        directory / WEIGHTS,
        layout={name: (safetensors.dtype_of(q.scheme), q.shape) for name, q in named.items()},
        tensors=((name, q.data) for name, q in named.items()),
    )
    config = _config(first.rank, first.scale * first.rank, base)
    config["target_modules"] = sorted({_end(modules[update.weight]) for update in updates})
    text = (json.dumps(config, indent=2) + "\n").encode()
    write_file(directory / CONFIG, text)


def _config(rank: int, alpha: float, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _modules(spec: ModelSpec) -> dict[str, str]:
    """Our name of a linear -> Hugging Face's of its module."""
    names = family_of(spec).names(spec)
    weights: Iterable[str] = (tensor.name for tensor in linears(spec))
    return {name: MODEL + names[name].hf.removesuffix(".weight") for name in weights}


def _end(module: str) -> str:
    return module.rpartition(".")[2]
