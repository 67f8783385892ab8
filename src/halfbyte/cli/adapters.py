"""Adapters on the command line: what `--lora` says, and a page about one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from halfbyte.cli.console import document
from halfbyte.cli.values import gib
from halfbyte.errors import InvalidInputError
from halfbyte.formats.lora import Stored, read_stored, split_scale


def named(given: Sequence[str]) -> dict[str, str]:
    """`[NAME=]PATH[@SCALE]` of every --lora as name -> `PATH[@SCALE]`; the name of the folder by
    default."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, reference = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            reference = text
            name = split_scale(text)[0].resolve().name
        if not name or name in found:
            raise InvalidInputError(
                f"'{name}' names two adapters" if name else "an adapter without a name",
                where=f"--lora {text}",
                hint="--lora NAME=PATH gives it another",
            )
        found[name] = reference
    return found


def describe(path: Path, *, as_json: bool) -> None:
    """What the adapter in a directory is, from its headers."""
    stored = read_stored(path)
    if as_json:
        document("inspect", _fields(path, stored))
        return
    config = stored.config
    click.echo(f"{path}")
    rows: dict[str, Any] = {
        "adapter": f"LoRA of {config.base or 'a model it does not name'}",
        "rank": _counted(stored, config.rank_of),
        "scale": f"{_counted(stored, config.scale_of)} (alpha {config.alpha:g})",
        "targets": ", ".join(f"{n} x {name}" for name, n in _kinds(stored).items()),
        "stored": f"{gib(stored.nbytes)} in {2 * len(stored.pairs)} tensors",
    }
    for word, text in rows.items():
        click.echo(f"  {word:12} {text}")


def _counted(stored: Stored, number: Any) -> str:
    """The distinct numbers of the modules, the commonest first."""
    found = Counter(number(module) for module in stored.pairs)
    return ", ".join(f"{value:g}" for value, _ in found.most_common())


def _kinds(stored: Stored) -> Counter[str]:
    return Counter(module.rpartition(".")[2] for module in stored.pairs)


def _fields(path: Path, stored: Stored) -> dict[str, Any]:
    config = stored.config
    return {
        "path": str(path),
        "adapter": "lora",
        "base": config.base,
        "rank": config.rank,
        "alpha": config.alpha,
        "rslora": config.rslora,
        "bytes": stored.nbytes,
        "modules": [
            {
                "name": module,
                "inputs": a.shape[1],
                "outputs": b.shape[0],
                "rank": config.rank_of(module),
                "scale": config.scale_of(module),
            }
            for module, (a, b) in stored.pairs.items()
        ],
    }
