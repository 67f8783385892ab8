"""GGUF files: the header, every tensor, and the checkpoint that it claims to be."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from halfbyte.errors import HalfbyteError
from halfbyte.formats.checkpoint import read
from halfbyte.formats.finite import check_finite
from halfbyte.formats.gguf import GGUFFile


def one_input(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(data)
        with suppress(HalfbyteError):
            file = GGUFFile(path)
            for name in file.infos:
                check_finite(file.tensor(name), name=name)
        source = read(path)
        with suppress(HalfbyteError):
            _ = source.assets
        for name, tensor in source.tensors():
            assert tensor.shape == next(t.shape for t in source.spec.tensors() if t.name == name)
