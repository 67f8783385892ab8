"""GGUF: twins of the gguf package in both directions, and every rule a hostile file may break."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from halfbyte.errors import HalfbyteError, IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.formats import gguf_writer
from halfbyte.formats.gguf import GGUFFile
from halfbyte.formats.gguf_parts import GGUFModel
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.count": 7,
    "a.below": -7,
    "a.large": 2**40,
    "a.far_below": -(2**40),
    "a.epsilon": 1e-5,
    "a.text": "grüß <|x|>",
    "a.ints": [1, -2, 3],
    "a.floats": [0.5, -1.25],
    "a.flags": [True, False, True],
    "a.texts": ["a", "", "▁b"],
}


def tensors() -> dict[str, QTensor]:
    rng = np.random.default_rng(0)
    made: dict[str, QTensor] = {}
    shapes = {"f32": (7,), "f16": (3, 5), "bf16": (1,), "q8_0": (3, 64), "q6_k": (2, 256)}
    for name, scheme in SCHEMES.items():
        if scheme.ggml_type is None:
            continue
        shape = shapes.get(name, (2, 3, 256))
        size = (math.prod(shape[:-1]), scheme.row_bytes(shape[-1]))
        made[f"blk.0.{name}"] = QTensor(scheme, shape, rng.integers(0, 256, size, dtype=np.uint8))
    return made


def write(path: Path, metadata: dict[str, Any] | None = None) -> None:
    made = tensors()
    gguf_writer.write(
        path,
        metadata=METADATA if metadata is None else metadata,
        layout={name: (tensor.scheme, tensor.shape) for name, tensor in made.items()},
        tensors=iter(made.items()),
    )


def test_gguf_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, value in METADATA.items():
        found = reader.fields[key].contents()
        wanted = float(np.float32(value)) if isinstance(value, float) else value
        assert found == wanted, key
    kinds = {key: reader.fields[key].types[-1].name for key in METADATA}
    assert kinds["a.count"] == "UINT32" and kinds["a.below"] == "INT32"
    assert kinds["a.ints"] == "INT32" and kinds["a.flags"] == "BOOL" and kinds["a.flag"] == "BOOL"
    assert kinds["a.large"] == "UINT64" and kinds["a.floats"] == "FLOAT32"
    made = tensors()
    assert [tensor.name for tensor in reader.tensors] == list(made)
    for tensor in reader.tensors:
        ours = made[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == ours.shape
        assert tensor.tensor_type == ours.scheme.ggml_type
        assert tensor.data_offset % 32 == 0
        assert tensor.data.tobytes() == ours.data.tobytes()


def test_we_read_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf")
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.metadata == METADATA
    assert {key: type(value) for key, value in file.metadata.items()} == {
        key: type(value) for key, value in METADATA.items()
    }
    for name, tensor in tensors().items():
        found = file.tensor(name)
        assert (found.scheme, found.shape) == (tensor.scheme, tensor.shape)
        assert found.data.tobytes() == tensor.data.tobytes()


def test_we_read_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint8("k.u8", 250)
    writer.add_int16("k.i16", -300)
    writer.add_float64("k.f64", 0.1)
    writer.add_array("k.tokens", ["<s>", "x"])
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("w", weight)
    writer.add_tensor("v", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.metadata["k.u8"] == 250 and file.metadata["k.i16"] == -300
    assert file.metadata["k.f64"] == 0.1 and file.metadata["k.tokens"] == ["<s>", "x"]
    assert file.tensor("w").shape == (2, 3)
    assert file.tensor("w").data.tobytes() == weight.tobytes()
    assert file.tensor("v").scheme.name == "f16"
    assert file.header_bytes % 64 == 0


def test_rope_divisors_come_from_the_tensor(tmp_path: Path) -> None:
    def header(values: list[float]) -> Any:
        data = np.array([values], dtype="<f4").view(np.uint8)
        tensor = QTensor(SCHEMES["f32"], (len(values),), data)
        gguf_writer.write(
            tmp_path / "r.gguf",
            metadata={"general.architecture": "llama"},
            layout={"rope_freqs.weight": (tensor.scheme, tensor.shape)},
            tensors=[("rope_freqs.weight", tensor)],
        )
        return GGUFModel(tmp_path / "r.gguf").header()

    assert header([1.0, 8.0, 1e30]).rope_divisors == (1.0, 8.0, math.inf)
    for bad in (math.nan, 0.0, -1.0):
        with pytest.raises(IntegrityError, match="not above 0"):
            header([bad])


# A hand-written file, so that each rule can be broken alone.


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def made(
    keys: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
    data: int = 64,
) -> bytes:
    keys, infos = keys or [], [info("w", [8])] if infos is None else infos
    counts = len(infos) if num_tensors is None else num_tensors
    counted = len(keys) if num_keys is None else num_keys
    head = magic + struct.pack("<IQQ", version, counts, counted) + b"".join(keys + infos)
    return head + bytes(-len(head) % 32) + bytes(data)


U32 = struct.Struct("<I").pack
BAD: dict[str, tuple[bytes, type[HalfbyteError], str]] = {
    "empty": (b"", IntegrityError, "empty"),
    "magic": (made(magic=b"GGML"), IntegrityError, "not a GGUF"),
    "version 1": (made(version=1), UnsupportedError, "version 1"),
    "version 4": (made(version=4), UnsupportedError, "version 4"),
    "big-endian": (made(version=3 << 24), UnsupportedError, "big-endian"),
    "too many tensors": (made(num_tensors=2**63), IntegrityError, "at most"),
    "more tensors than there are": (made(num_tensors=9), IntegrityError, "bytes|dimensions|empty"),
    "too many keys": (made(num_keys=2**40), IntegrityError, "at most"),
    "repeated key": (made([key("a", 4, U32(1))] * 2), IntegrityError, "repeated"),
    "empty key": (made([key("", 4, U32(1))]), IntegrityError, "empty or"),
    "long key": (made([key("k" * 70_000, 4, U32(1))]), IntegrityError, "at most"),
    "key beyond the file": (made([struct.pack("<Q", 60_000)]), IntegrityError, "at least"),
    "unknown type": (made([key("a", 13, U32(1))]), IntegrityError, "unknown value type 13"),
    "not UTF-8": (made([key("a", 8, text(b"\xff"))]), IntegrityError, "UTF-8"),
    "long string": (
        made([key("a", 8, struct.pack("<Q", 2**60))]),
        IntegrityError,
        "at most",
    ),
    "bool of 2": (made([key("a", 7, b"\x02")]), IntegrityError, "neither true nor false"),
    "array of arrays": (
        made([key("a", 9, struct.pack("<IQ", 9, 1))]),
        IntegrityError,
        "unknown item type 9",
    ),
    "long array": (made([key("a", 9, struct.pack("<IQ", 0, 2**62))]), IntegrityError, "at most"),
    "long arrays": (
        made([key(name, 9, struct.pack("<IQ", 0, 1 << 23) + bytes(1 << 23)) for name in "abc"]),
        IntegrityError,
        "8388608 items in 'c'; at most 0",
    ),
    "array beyond the file": (
        made([key("a", 9, struct.pack("<IQ", 12, 10_000_000))]),
        IntegrityError,
        "header needs at least",
    ),
    "strings beyond the file": (
        made([key("a", 9, struct.pack("<IQ", 8, 10_000_000) + text("x"))]),
        IntegrityError,
        "cut short|array",
    ),
    "huge string in an array": (
        made([key("a", 9, struct.pack("<IQQ", 8, 1, 2**63))]),
        IntegrityError,
        "in an array",
    ),
    "alignment 0": (made([key("general.alignment", 4, U32(0))]), IntegrityError, "alignment"),
    "alignment 24": (made([key("general.alignment", 4, U32(24))]), IntegrityError, "alignment"),
    "alignment text": (
        made([key("general.alignment", 8, text("32"))]),
        IntegrityError,
        "alignment",
    ),
    "repeated tensor": (made(infos=[info("w", [8])] * 2), IntegrityError, "repeated"),
    "long tensor name": (made(infos=[info("w" * 65, [8])]), IntegrityError, "at most 64"),
    "no dimensions": (made(infos=[info("w", [])]), IntegrityError, "0 dimensions"),
    "5 dimensions": (made(infos=[info("w", [1] * 5)]), IntegrityError, "5 dimensions"),
    "dimension 0": (made(infos=[info("w", [8, 0])]), IntegrityError, "dimensions"),
    "overflow": (made(infos=[info("w", [2**32, 2**32])]), IntegrityError, "dimensions"),
    "wraps to small": (made(infos=[info("w", [2**62, 8])]), IntegrityError, "dimensions"),
    "half a block": (made(infos=[info("w", [33], 2)]), IntegrityError, "no multiple of 32"),
    "misaligned": (made(infos=[info("w", [8], offset=16)]), IntegrityError, "not aligned"),
    "beyond the file": (made(infos=[info("w", [17])]), IntegrityError, "has .* bytes .* ends at"),
    "far beyond": (made(infos=[info("w", [8], offset=2**63)]), IntegrityError, "ends at"),
    "overlap": (made(infos=[info("v", [8]), info("w", [8])]), IntegrityError, "overlap"),
    "IQ3_S": (made(infos=[info("w", [256], 21)]), UnsupportedError, "'w' .* IQ3_S"),
    "type 999": (made(infos=[info("w", [8], 999)]), UnsupportedError, "'w' .* 999"),
}


@pytest.mark.parametrize(("data", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_refused(
    tmp_path: Path, data: bytes, kind: type[HalfbyteError], message: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(kind, match=message) as caught:
        GGUFFile(tmp_path / "x.gguf")
    assert caught.value.where == str(tmp_path / "x.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_the_same_file_unbroken(tmp_path: Path, version: int) -> None:
    (tmp_path / "x.gguf").write_bytes(made([key("a", 4, U32(5))], version=version))
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.metadata == {"a": 5} and file.tensor("w").shape == (8,)


def test_damage_is_only_ever_a_halfbyte_error(tmp_path: Path) -> None:
    write(tmp_path / "good.gguf")
    good = (tmp_path / "good.gguf").read_bytes()
    head = GGUFFile(tmp_path / "good.gguf").header_bytes
    path, rng = tmp_path / "bad.gguf", random.Random(2)
    for length in [*range(head), *range(head, len(good), 97)]:
        path.write_bytes(good[:length])
        with pytest.raises(IntegrityError):
            GGUFFile(path)
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(head)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            file = GGUFFile(path)
            for name in file.infos:
                file.tensor(name)
        except HalfbyteError:
            pass


def test_a_large_vocabulary_is_read(tmp_path: Path) -> None:
    """262,144 tokens and twice as many merges, as Gemma's."""
    tokens = [f"token{index}" for index in range(262_144)]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.merges": [f"tok {index}" for index in range(2 * len(tokens))],
    }
    write(tmp_path / "x.gguf", metadata)
    assert GGUFFile(tmp_path / "x.gguf").metadata == metadata


def test_what_cannot_be_metadata(tmp_path: Path) -> None:
    for value in ([1, 0.5], {"a": 1}, [2**31], None):
        with pytest.raises(InvalidInputError):
            write(tmp_path / "x.gguf", {"bad": value})
    assert not list(tmp_path.iterdir())
    write(tmp_path / "x.gguf", {"empty": [], "kept": 1})
    assert GGUFFile(tmp_path / "x.gguf").metadata == {"kept": 1}
