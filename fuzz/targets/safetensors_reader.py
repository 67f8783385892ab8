"""Safetensors files: the header and every tensor."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from halfbyte.errors import HalfbyteError
from halfbyte.formats.finite import check_finite
from halfbyte.formats.safetensors import open_directory


def one_input(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(data)
        for name, file in open_directory(Path(folder)).items():
            with suppress(HalfbyteError):
                check_finite(file.tensor(name), name=name)
