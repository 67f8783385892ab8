"""How a model's makers want it to be sampled, and where it stops: generation_config.json or GGUF.

Values a file does not give are None; the caller has the defaults.
Source: Hugging Face GenerationConfig; GGUF general.sampling.*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.text import fields

# A single precision float holds about seven digits; more would only show its rounding.
_DIGITS = 7

# our name (and generation_config's), GGUF's name, smallest, largest
_KNOBS = (
    ("temperature", "temp", 0.0, 100.0),
    ("top_k", "top_k", 0, 2**31 - 1),
    ("top_p", "top_p", 1e-6, 1.0),
    ("min_p", "min_p", 0.0, 1.0),
    ("repetition_penalty", "penalty_repeat", 0.01, 100.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """The sampling knobs as `SamplingParams` has them, and ids: those that end an answer
    (`eos_ids`, sorted) and those that are never produced (`suppress_ids`)."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_ids: tuple[int, ...] = ()
    suppress_ids: tuple[int, ...] = ()


def defaults_from_config(
    config: Mapping[str, Any], *, eos_ids: tuple[int, ...], vocab_size: int
) -> GenerationDefaults:
    """From generation_config.json. `do_sample: false` is the temperature 0."""
    knobs = {name: fields.number(config, name, low, high) for name, _, low, high in _KNOBS}
    if fields.flag(config, "do_sample") is False:
        knobs["temperature"] = 0.0
    suppress = fields.token_ids(config, "suppress_tokens", vocab_size)
    return _defaults(knobs, eos_ids, tuple(suppress))


def defaults_to_config(defaults: GenerationDefaults) -> dict[str, Any]:
    """The fields of a generation_config.json; the temperature 0 is `do_sample: false`."""
    values: dict[str, Any] = {
        name: getattr(defaults, name) for name, *_ in _KNOBS if getattr(defaults, name) is not None
    }
    if defaults.temperature is not None:
        values["do_sample"] = defaults.temperature > 0
        if not values["do_sample"]:
            del values["temperature"]
    values["eos_token_id"] = list(defaults.eos_ids)
    if defaults.suppress_ids:
        values["suppress_tokens"] = list(defaults.suppress_ids)
    return values


def defaults_from_metadata(
    metadata: Mapping[str, Any], *, eos_ids: tuple[int, ...], vocab_size: int
) -> GenerationDefaults:
    """From general.sampling.* and tokenizer.ggml.suppress_tokens."""
    knobs = {
        name: fields.number(metadata, f"general.sampling.{key}", low, high)
        for name, key, low, high in _KNOBS
    }
    suppress = fields.token_ids(metadata, "tokenizer.ggml.suppress_tokens", vocab_size)
    return _defaults(knobs, eos_ids, tuple(suppress))


def defaults_to_metadata(defaults: GenerationDefaults) -> dict[str, Any]:
    """The keys of the values that are set."""
    values: dict[str, Any] = {
        f"general.sampling.{key}": getattr(defaults, name)
        for name, key, _, _ in _KNOBS
        if getattr(defaults, name) is not None
    }
    if defaults.suppress_ids:
        values["tokenizer.ggml.suppress_tokens"] = list(defaults.suppress_ids)
    return values


def _defaults(
    knobs: Mapping[str, float | None], eos_ids: tuple[int, ...], suppress: tuple[int, ...]
) -> GenerationDefaults:
    return GenerationDefaults(
        temperature=_rounded(knobs["temperature"]),
        top_k=None if knobs["top_k"] is None else int(knobs["top_k"]),
        top_p=_rounded(knobs["top_p"]),
        min_p=_rounded(knobs["min_p"]),
        repetition_penalty=_rounded(knobs["repetition_penalty"]),
        eos_ids=eos_ids,
        suppress_ids=suppress,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
