"""Safetensors: twins of the reference library, and every way a file can lie."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.errors import HalfbyteError, IntegrityError, UnsupportedError
from halfbyte.formats import safetensors
from halfbyte.formats.safetensors import INDEX, SINGLE, SafetensorsFile
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES

WEIGHTS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.linspace(-1, 1, 10).to(torch.bfloat16).reshape(5, 2),
    "c": torch.tensor([1.5, -2.25], dtype=torch.float16),
}


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.infos.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        tensor = file.tensor(name)
        assert tensor.shape == tuple(weight.shape)
        assert tensor.data.tobytes() == bytes_of(weight)
        file.release(name)
        assert tensor.data.tobytes() == bytes_of(weight), "a view outlives the release"


def test_the_reference_library_reads_what_we_write(tmp_path: Path) -> None:
    schemes = {"a": "f32", "b": "bf16", "c": "f16"}
    tensors = {
        name: QTensor(
            SCHEMES[schemes[name]],
            tuple(weight.shape),
            np.frombuffer(bytes_of(weight), np.uint8).reshape(
                weight.shape[0] if weight.ndim > 1 else 1, -1
            ),
        )
        for name, weight in WEIGHTS.items()
    }
    layout = {n: (safetensors.dtype_of(t.scheme), t.shape) for n, t in tensors.items()}
    seen: list[tuple[int, int]] = []
    path = tmp_path / "y.safetensors"
    safetensors.write(
        path,
        layout=layout,
        tensors=((name, tensor.data) for name, tensor in tensors.items()),
        progress=lambda *bytes_done: seen.append(bytes_done),
    )
    read = load_file(path)
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(read[name], weight) for name, weight in WEIGHTS.items())
    assert seen == [(48, 72), (68, 72), (72, 72)]
    assert [item.name for item in tmp_path.iterdir()] == ["y.safetensors"]


BAD = {
    "empty file": b"",
    "no header": b"\x05\x00\x00",
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "not JSON": raw(b"{nonsense"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "a list": raw([]),
    "nested too deep": raw(b"[" * 100_000),
    "number too long": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "repeated name": raw(b'{"a": 1, "a": 2}'),
    "entry is no table": raw({"a": 3}),
    "extra field": raw({"a": {**entry(0, 4, [1]), "x": 1}}, bytes(4)),
    "gap": raw({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "overlap": raw({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "does not begin at 0": raw({"a": entry(4, 8, [1])}, bytes(8)),
    "bytes left over": raw({"a": entry(0, 4, [1])}, bytes(8)),
    "cut short": raw({"a": entry(0, 8, [2])}, bytes(7)),
    "size and shape differ": raw({"a": entry(0, 8, [3])}, bytes(8)),
    "negative size": raw({"a": entry(0, -4, [-1])}),
    "size is true": raw({"a": entry(0, 4, [True])}, bytes(4)),
    "fraction": raw(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', bytes(4)),
    "product overflows": raw({"a": entry(0, 4, [2**40, 2**40])}, bytes(4)),
    "three offsets": raw({"a": {**entry(0, 4, [1]), "data_offsets": [0, 4, 4]}}, bytes(4)),
    "metadata is a list": raw({"__metadata__": []}),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        SafetensorsFile(tmp_path / SINGLE)
    assert caught.value.where == str(tmp_path / SINGLE)


def test_types_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(raw({"a": entry(0, 4, [1], "I32")}, bytes(4)))
    with pytest.raises(UnsupportedError, match="a: stored as I32"):
        SafetensorsFile(path).tensor("a")
    path.write_bytes(raw({"a": entry(0, 8, [1], "Z9")}, bytes(8)))
    with pytest.raises(UnsupportedError, match="unknown type 'Z9'"):
        SafetensorsFile(path)


def test_whole_numbers_of_64_bits_become_f32(tmp_path: Path) -> None:
    path, header = tmp_path / SINGLE, {"a": entry(0, 16, [2], "I64")}
    path.write_bytes(raw(header, struct.pack("<2q", 262143, -2)))
    tensor = SafetensorsFile(path).tensor("a")
    assert tensor.scheme.name == "f32" and tensor.data.view("<f4").tolist() == [[262143, -2]]
    path.write_bytes(raw(header, struct.pack("<2q", 2**24 + 1, 0)))
    with pytest.raises(IntegrityError, match="'a' holds whole numbers too large"):
        SafetensorsFile(path).tensor("a")


def test_damage_is_only_ever_a_halfbyte_error(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    path, rng = tmp_path / SINGLE, random.Random(1)
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(IntegrityError):
            SafetensorsFile(path)
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data) - 72)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            file = SafetensorsFile(path)
            for name in file.infos:
                file.tensor(name)
        except HalfbyteError:
            pass


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """a and b in one shard, c in another."""
    save_file({"a": WEIGHTS["a"], "b": WEIGHTS["b"]}, tmp_path / "model-1.safetensors")
    save_file({"c": WEIGHTS["c"]}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {})
    return tmp_path


def write_index(directory: Path, changes: dict[str, str | None]) -> None:
    one, two = "model-1.safetensors", "model-2.safetensors"
    weight_map = {"a": one, "b": one, "c": two} | changes
    weight_map = {name: file for name, file in weight_map.items() if file is not None}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(shards: Path) -> None:
    files = safetensors.open_directory(shards)
    assert files.keys() == WEIGHTS.keys()
    assert files["c"].tensor("c").data.tobytes() == bytes_of(WEIGHTS["c"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model-2.safetensors").unlink(), "shard model-2.safetensors is missing"),
        (lambda d: write_index(d, {"c": "../model-2.safetensors"}), "names a file outside"),
        (lambda d: write_index(d, {"c": "/etc/x.safetensors"}), "names a file outside"),
        (lambda d: write_index(d, {"c": "model-1.safetensors"}), "disagrees .* about: c"),
        (lambda d: write_index(d, {"d": "model-1.safetensors"}), "disagrees .* about: d"),
        (lambda d: write_index(d, {"b": None}), "disagrees .* about: b"),
        (lambda d: (d / INDEX).write_text("{}"), "no weight_map"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), "no weight_map"),
        (
            lambda d: save_file(dict(WEIGHTS), d / "model-2.safetensors"),
            "disagrees .* about",
        ),
    ],
)
def test_a_wrong_index(shards: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(shards)
    with pytest.raises(IntegrityError, match=message):
        safetensors.open_directory(shards)


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="neither"):
        safetensors.open_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="pickled"):
        safetensors.open_directory(tmp_path)
