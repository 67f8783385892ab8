"""PEFT's adapter_config.json: which modules an adapter changes, by what rank and scale.

Only what is plain LoRA is taken. A field we do not know, or one that asks for more than an update
`scale * B @ A` of a linear, is refused by its name; it would change what the adapter computes.
Patterns come from strangers and are never run as regular expressions: where the targets are one,
they are what the file holds; the keys of rank_pattern and alpha_pattern are names.

Source: https://huggingface.co/docs/peft/package_reference/lora (LoraConfig).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, cast

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.formats.documents import read_json

CONFIG = "adapter_config.json"
LARGEST_RANK = 65_536
LARGEST_ALPHA = 1e9
MERGE = "plain LoRA of linear layers runs; what is more can be merged into its model"

USED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("bias", "init_lora_weights", "base_model_name_or_path"),
}
# What says something of training, of the base model or of features that are off.
HARMLESS = {
    *("auto_mapping", "peft_version", "revision", "task_type", "inference_mode", "lora_dropout"),
    *("megatron_config", "megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
    *("ensure_weight_tying", "lora_ga_config"),
}
# They train against a base whose weights they changed first.
ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """`targets` None: a pattern, or names without some; the file says which modules there are.

    Names of modules are those of PEFT without `base_model.model.`; a key stands for the module of
    that name and for all whose names end in it.
    """

    path: Path
    rank: int
    alpha: float
    rslora: bool
    targets: frozenset[str] | None
    layers: frozenset[int] | None
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    base: str | None

    def covers(self, module: str) -> bool:
        """Whether a module that exists is one of the targets; of a pattern that is not known."""
        if self.targets is None:
            return False
        if module in self.targets:
            return True
        return _keyed(self.targets, module) is not None and (
            self.layers is None or _layer_of(module) in self.layers
        )

    def rank_of(self, module: str) -> int:
        key = _keyed(self.ranks, module)
        return self.rank if key is None else self.ranks[key]

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        key = _keyed(self.alphas, module)
        alpha = self.alpha if key is None else self.alphas[key]
        rank = self.rank_of(module)
        return alpha / sqrt(rank) if self.rslora else alpha / rank


def read_config(directory: Path) -> LoraConfig:
    """The configuration of the adapter in a directory.

    Raises `UnsupportedError` for what is not plain LoRA, `IntegrityError` for absurd values.
    """
    path = directory / CONFIG
    fields = _Fields(read_json(path), path)
    kind = fields.values.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"an adapter of type {kind!r:.40}", where=path, hint="LORA runs")
    fields.refuse_unknown()
    return LoraConfig(
        path=path,
        rank=fields.rank("r", fields.values.get("r", 8)),
        alpha=fields.number("lora_alpha", fields.values.get("lora_alpha", 8)),
        rslora=fields.values.get("use_rslora") is True,
        targets=fields.targets(),
        layers=fields.indices(fields.values.get("layers_to_transform")),
        ranks={key: fields.rank(key, value) for key, value in fields.pattern("rank_pattern")},
        alphas={key: fields.number(key, value) for key, value in fields.pattern("alpha_pattern")},
        base=fields.base(),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """The document, and the checks of its values."""

    values: Mapping[str, Any]
    path: Path

    def refuse_unknown(self) -> None:
        for name, value in self.values.items():
            if name not in USED and name not in HARMLESS and value:
                raise self._unsupported(f"{name} = {value!r:.60}")
        if self.values.get("bias", "none") != "none":
            raise self._unsupported(f"bias = {self.values['bias']!r:.40}; trained biases")
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(ALTERS_BASE):
            raise self._unsupported(f"init_lora_weights = {start!r:.40}; it altered its base model")

    def targets(self) -> frozenset[str] | None:
        targets, without = self.values.get("target_modules"), self.values.get("exclude_modules")
        if isinstance(targets, str) or without:
            return None
        if not _strings(targets) or not targets:
            raise self._wrong(f"target_modules is {targets!r:.60}; a list of names is needed")
        return frozenset(targets)

    def indices(self, value: Any) -> frozenset[int] | None:
        if value is None or value == []:
            return None
        found = cast("list[object]", value) if isinstance(value, list) else [value]
        if not all(type(index) is int for index in found):
            raise self._wrong(f"layers_to_transform is {value!r:.60}")
        if self.values.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
            raise self._unsupported("layers_pattern other than 'layers'")
        return frozenset(cast("list[int]", found))

    def pattern(self, name: str) -> list[tuple[str, Any]]:
        """Keys as names: an anchor and escaped dots are read, another pattern is refused."""
        table = self.values.get(name) or {}
        if not isinstance(table, dict):
            raise self._wrong(f"{name} is no table")
        named: list[tuple[str, Any]] = []
        for key, value in cast("dict[str, Any]", table).items():
            plain = key.replace("\\.", ".")
            if not plain.removeprefix("^").replace(".", "").replace("_", "").isalnum():
                raise self._unsupported(f"the pattern {key!r:.60} in {name}")
            named.append((plain, value))
        return named

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= LARGEST_RANK:
            raise self._wrong(f"the rank {name!r:.60} is {value!r:.40}")
        return value

    def number(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= LARGEST_ALPHA:
            raise self._wrong(f"the scale {name!r:.60} is {value!r:.40}")
        return float(value)

    def base(self) -> str | None:
        value = self.values.get("base_model_name_or_path")
        return value if isinstance(value, str) and value else None

    def _unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(what, where=self.path, hint=MERGE)

    def _wrong(self, what: str) -> IntegrityError:
        return IntegrityError(what, where=self.path)


def _keyed(keys: Collection[str], module: str) -> str | None:
    """The first key that stands for a module."""
    for key in keys:
        if module == key.removeprefix("^") or (module.endswith("." + key)):
            return key
    return None


def _layer_of(module: str) -> int | None:
    _, found, rest = module.partition(".layers.")
    index = rest.split(".")[0]
    return int(index) if found and index.isdecimal() else None


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, str) for item in cast("list[object]", value)
    )
