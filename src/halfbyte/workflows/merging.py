"""An original as it is meant: a checkpoint, with adapters merged into it if some are named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.formats.checkpoint import Checkpoint, Source, read
from halfbyte.formats.lora import open_adapter, split_scale
from halfbyte.formats.manifest import check_sizes, hashes, weights_hash
from halfbyte.formats.merged import Merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """`checkpoint` at `place`, and what is made of it: `source`, the same without adapters.

    `adapters` are `PATH[@SCALE]`, as they were named.
    """

    place: Path
    checkpoint: Checkpoint
    source: Source
    adapters: Sequence[str]

    def called(self, base: str) -> str:
        """A name for people, from that of the checkpoint."""
        return " + ".join([base, *map(_called, self.adapters)])

    def weights(self) -> str:
        """A hash of all that it computes with. Reads all of it."""
        base = weights_hash(self.place)
        if not self.adapters:
            return base
        return hashlib.sha256(json.dumps([base, self.facts()]).encode()).hexdigest()

    def facts(self) -> list[dict[str, Any]]:
        """What a manifest says of the adapters."""
        return [
            {"name": path.resolve().name, "scale": scale, "files": hashes(path)}
            for path, scale in map(split_scale, self.adapters)
        ]


def original(place: Path, adapters: Sequence[str] = ()) -> Original:
    """The checkpoint at a place, with adapters merged into it. Reads headers only.

    Raises `IntegrityError` for an adapter of another model, `InvalidInputError` for one that
    changes weights that are quantized.
    """
    check_sizes(place)
    checkpoint = read(place)
    fitting = [open_adapter(reference, checkpoint.spec) for reference in adapters]
    for adapter in fitting:
        check_sizes(adapter.stored.file.path.parent)
    source = Merged(checkpoint, fitting) if fitting else checkpoint
    return Original(place=place, checkpoint=checkpoint, source=source, adapters=tuple(adapters))


def _called(reference: str) -> str:
    path, scale = split_scale(reference)
    name = path.resolve().name
    return name if scale == 1 else f"{name}@{scale:g}"
