"""Checkpoints that other packages quantized: their settings, and every matrix they pack."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from halfbyte.errors import HalfbyteError
from halfbyte.formats.documents import parse_json
from halfbyte.formats.finite import check_finite
from halfbyte.formats.packed import unpacked
from halfbyte.formats.safetensors import open_directory
from halfbyte.numerics import int8, nf4

BEFOREHAND = (int8, nf4)  # what unpacking would import, before its memory is counted


def one_input(data: bytes) -> None:
    """The quantization_config as JSON, a zero byte, and the safetensors file."""
    settings, _, weights = data.partition(b"\0")
    with TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(weights)
        config = {"quantization_config": parse_json(settings, where=Path("config.json"))}
        files = unpacked(config, open_directory(Path(folder)))
        for name, file in files.items():
            with suppress(HalfbyteError):
                info = file.infos[name]
                tensor = file.tensor(name)
                assert (tensor.scheme, tensor.shape) == (info.scheme, info.shape)
                check_finite(tensor, name=name)
