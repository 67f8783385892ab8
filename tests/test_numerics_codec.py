"""The codecs against the `gguf` package, byte for byte, and against golden files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte.errors import IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.formats.finite import SCALES
from halfbyte.numerics import QTensor, codec
from halfbyte.numerics.affine import AFFINE
from halfbyte.numerics.codec import CODECS, ROW_CODECS, Method, convert, decode, encode
from halfbyte.specs import SCHEMES, lossless_target, scheme_of
from halfbyte.specs.scheme import HOLDERS

IN_GGUF = [name for name, scheme in SCHEMES.items() if scheme.ggml_type is not None]
ENCODABLE = [name for name, (_, encoder) in CODECS.items() if encoder] + list(ROW_CODECS)
Q5_0, Q5_1 = 7, 8  # the types in the golden files, not those of GGUF
GGUF_EXACT = ["f32", "f16", "bf16", "q8_0", "q4_0"]


def _type(name: str) -> GGMLQuantizationType:
    kind = scheme_of(name).ggml_type
    assert kind is not None
    return GGMLQuantizationType(kind)


def _theirs(data: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.dequantize(data, _type(name)).astype(np.float32)


def _bytes(name: str, rows: int, blocks: int, seed: int) -> QTensor:
    """Every byte random, except that fp16 scales are finite: gguf decodes those to NaN as well."""
    scheme = scheme_of(name)
    data = np.random.default_rng(seed).integers(
        0, 256, (rows * blocks, scheme.block_bytes), dtype=np.uint8
    )
    _, first, last = ("f16", 0, 2) if name == "f16" else SCALES.get(name, ("f16", 0, 0))
    data[:, first + 1 : last : 2] &= 0xBF  # clears the top exponent bit: below 2, subnormals too
    return QTensor(scheme, (rows, blocks * scheme.block), data.reshape(rows, -1))


def _extremes() -> np.ndarray:
    """Blocks of 32 that have broken quantizers: f32 [n, 32]."""
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((1, 32)).astype(np.float32)
    one = np.zeros((1, 32), np.float32)
    one[0, 7] = 1
    ramp = np.linspace(-1, 1, 32, dtype=np.float32)[None]
    halves = (np.arange(32, dtype=np.float32)[None] - 16) / 2  # ties of every kind
    signs = np.tile(np.array([1, -1], np.float32), (1, 16))
    blocks = [
        np.zeros((1, 32)), np.full((1, 32), -0.0), one, -one, ramp, -ramp, halves, -halves,
        halves * 127 / 8, np.full((1, 32), 3.5), np.full((1, 32), -3.5), noise, -noise,
        noise * 1e-7, noise * 1e-20, noise * 1e-36, np.full((1, 32), 6e-8), signs * 4.7e-7,
        noise + 1e4 * one, noise - 1e4 * one, 65504 * one, -65504 * one, noise.clip(-1, 1) * 60000,
        signs, -signs, signs + ramp, 0.49999997 * signs + 127 * one,
    ]  # fmt: skip
    return np.concatenate(blocks).astype(np.float32)


@pytest.mark.parametrize("name", IN_GGUF)
def test_decoding_equals_gguf_bit_for_bit(name: str) -> None:
    q = _bytes(name, rows=9, blocks=5, seed=1)
    ours = decode(q).numpy()
    assert ours.shape == q.shape and ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), _theirs(q.data, name).view(np.uint32))


@pytest.mark.parametrize("name", GGUF_EXACT)
def test_rounding_to_nearest_equals_gguf_byte_for_byte(name: str) -> None:
    rng = np.random.default_rng(2)
    for x in (
        rng.standard_normal((33, 96)).astype(np.float32),
        (rng.standard_t(2, (40, 64)) * 0.02).astype(np.float32),
        rng.integers(-9, 10, (50, 32)).astype(np.float32),  # ties in magnitude and in rounding
        _extremes(),
    ):
        theirs = gguf.quants.quantize(x, _type(name)).view(np.uint8)
        np.testing.assert_array_equal(encode(torch.from_numpy(x), scheme_of(name)).data, theirs)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        (3, 32),
        # Below 1e-36 the reciprocal of a scale overflows, where gguf's casts are undefined.
        elements=st.floats(-65504, 65504, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30),
    )
)
def test_any_block_encodes_as_gguf_does(x: np.ndarray) -> None:
    for name in ("q8_0", "q4_0", "bf16"):
        theirs = gguf.quants.quantize(x, _type(name))
        np.testing.assert_array_equal(encode(torch.from_numpy(x), scheme_of(name)).data, theirs)


def test_bf16_weights_encode_as_their_f32_values() -> None:
    x = torch.randn(64, 64).bfloat16()  # equal magnitudes of both signs are common here
    theirs = gguf.quants.quantize(x.float().numpy(), _type("q4_0"))
    np.testing.assert_array_equal(encode(x, scheme_of("q4_0")).data, theirs)


@pytest.mark.parametrize("version", ["4v0-660K", "5v1-730K"])
@pytest.mark.parametrize("name", ["q5_0", "q5_1"])
def test_golden_five_bit_files_decode_to_their_originals(
    shared_data: Path, version: str, name: str
) -> None:
    """ggml wrote these from the f32 file beside them: the values are within half a step of it."""
    golden = shared_data / "ggml_q5_golden"
    originals = _rwkv_tensors(golden / f"tiny-rwkv-{version}-FP32.bin")
    stored = _rwkv_tensors(golden / f"tiny-rwkv-{version}-{name.upper()}.bin")
    scheme = scheme_of(name)
    quantized = {key: value for key, value in stored.items() if value[1] in (Q5_0, Q5_1)}
    assert len(quantized) == {"4v0-660K": 28, "5v1-730K": 84}[version]
    for key, (shape, _, raw) in quantized.items():
        original = np.frombuffer(originals[key][2], np.float32).reshape(shape)
        q = QTensor(scheme, shape, np.frombuffer(raw, np.uint8).reshape(shape[0], -1))
        ours = decode(q).numpy()
        np.testing.assert_array_equal(ours, _theirs(q.data, name))
        np.testing.assert_array_equal(q.data, gguf.quants.quantize(original, _type(name)))
        scale = np.linalg.norm(original)
        if np.abs(original).max() > 1e-5:  # the others underflow fp16 scales
            assert np.linalg.norm(ours - original) < 0.08 * scale, key


def _rwkv_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    """Name -> (shape with rows first, type, bytes); see SOURCE.txt beside the files."""
    raw = path.read_bytes()
    at, tensors = 24, {}
    while at < len(raw):
        dims, key_len, kind = struct.unpack_from("<3I", raw, at)
        shape = struct.unpack_from(f"<{dims}I", raw, at + 12)[::-1]
        start = at + 12 + 4 * dims + key_len
        block, size = {0: (1, 4), Q5_0: (32, 22), Q5_1: (32, 24)}[kind]
        stop = start + int(np.prod(shape)) // block * size
        tensors[raw[start - key_len : start].decode()] = (shape, kind, raw[start:stop])
        at = stop
    return tensors


@pytest.mark.parametrize("name", ENCODABLE)
@pytest.mark.parametrize("method", ["rtn", "search"])
def test_tiles_and_chunks_leave_no_trace(
    name: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, importance = scheme_of(name), torch.rand(512) if method == "search" else None
    weight = torch.randn(3, 7, 512)
    original = weight.clone()
    whole = encode(weight, scheme, method=method, importance=importance)
    assert torch.equal(weight, original)
    values = decode(whole)
    source = encode(weight, scheme_of("f16"))
    converted = convert(source, scheme, method=method)
    monkeypatch.setattr(codec, "TILE", 768)
    monkeypatch.setattr(codec, "CONVERT_CHUNK", 1500)
    tiled = encode(weight, scheme, method=method, importance=importance)
    assert whole.shape == (3, 7, 512) == tuple(values.shape)
    np.testing.assert_array_equal(tiled.data, whole.data)
    assert torch.equal(decode(whole), values)
    np.testing.assert_array_equal(convert(source, scheme, method=method).data, converted.data)
    by_hand = encode(decode(source), scheme, method=method)
    np.testing.assert_array_equal(by_hand.data, converted.data)


@pytest.mark.parametrize(
    ("name", "holder"), [(name, holder) for name, held in HOLDERS.items() for holder in held]
)
def test_a_holder_takes_every_value_exactly(name: str, holder: str) -> None:
    q = _bytes(name, rows=7, blocks=6, seed=4)
    if name in AFFINE:
        q = encode(decode(q), q.scheme)  # the zero points of random bytes are too large
    held = convert(q, scheme_of(holder), method="search")
    assert held.scheme.name == holder and held.shape == q.shape
    values = decode(q)
    assert torch.equal(decode(held), values)  # -0 and 0 are one value
    if holder in IN_GGUF:
        np.testing.assert_array_equal(_theirs(held.data, holder), values.numpy())
    assert torch.equal(decode(convert(held, scheme_of("f32"))), values)


def test_what_loses_nothing_is_found() -> None:
    def target(name: str, *available: str) -> str:
        return lossless_target(scheme_of(name), [scheme_of(item) for item in available]).name

    native = ("f32", "f16", "bf16", "q8_0", "q4_0", "q6_k")
    assert [target(name, *native) for name in native] == list(native)
    assert {name: target(name, *native) for name in SCHEMES if name not in native} == {
        "q5_0": "q8_0", "iq4_nl": "q8_0", "q3_k": "q6_k", "q4_1": "f32", "q5_1": "f32",
        "q2_k": "f32", "q4_k": "f32", "q5_k": "f32", "iq4_xs": "f32", "nf4": "f32", "int8": "f32",
        **{name: "q8_0" if layout.zero else "q4_0" for name, layout in AFFINE.items()},
    }  # fmt: skip
    assert target("q5_0", "f16", "f32") == "f32"
    with pytest.raises(UnsupportedError, match="among f16, q8_0 holds bf16"):
        target("bf16", "f16", "q8_0")


@pytest.mark.parametrize("name", [name for name in IN_GGUF if name not in HOLDERS])
def test_no_smaller_scheme_would_do(name: str) -> None:
    """f32 is the honest answer for the others: neither 16-bit float holds what they decode to."""
    values = decode(_bytes(name, rows=7, blocks=6, seed=4))
    for plain in {"f16": torch.float16, "bf16": torch.bfloat16}.items():
        if name not in ("f32", plain[0]):
            assert not torch.equal(values.to(plain[1]).float(), values)


def test_converting_to_the_same_scheme_returns_the_tensor_itself() -> None:
    q = _bytes("q4_k", rows=2, blocks=1, seed=3)
    assert convert(q, scheme_of("q4_k")) is q


def test_weights_may_be_strided_half_precise_and_need_gradients() -> None:
    weight = torch.randn(64, 128, dtype=torch.float16, requires_grad=True)
    expected = encode(weight.detach().t().float().contiguous(), scheme_of("q4_0"))
    np.testing.assert_array_equal(encode(weight.t(), scheme_of("q4_0")).data, expected.data)


def test_vectors_are_one_row_and_nothing_is_nothing() -> None:
    assert encode(torch.ones(96), scheme_of("q8_0")).data.shape == (1, 102)
    empty = encode(torch.ones(0, 64), scheme_of("q4_0"))
    assert empty.data.shape == (0, 36) and decode(empty).shape == (0, 64)


def test_read_only_bytes_decode_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    data = np.frombuffer(bytes(34 * 4), np.uint8).reshape(2, 68)
    assert not data.flags.writeable
    assert not decode(QTensor(scheme_of("q8_0"), (2, 64), data)).any()
    assert not recwarn.list


@pytest.mark.parametrize("name", ENCODABLE)
def test_weights_that_are_not_numbers_are_counted(name: str) -> None:
    weight = torch.randn(5000, 256)
    weight[7, 3], weight[4999, 255], weight[2500, 0] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(IntegrityError, match=r"3 of 1280000 weights"):
        encode(weight, scheme_of(name))


@pytest.mark.parametrize("name", ["f16", "bf16", "q8_0", "q4_0", "q6_k"])
@pytest.mark.parametrize("method", ["rtn", "search"])
def test_a_magnitude_that_does_not_fit_is_refused(name: str, method: Method) -> None:
    weight = torch.randn(2, 256)
    weight[1, 5] = 3.4e38
    with pytest.raises(UnsupportedError, match="does not fit"):
        encode(weight, scheme_of(name), method=method)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in ENCODABLE])
def test_a_scheme_without_an_encoder_names_those_that_have_one(name: str) -> None:
    for attempt in (encode, lambda x, scheme: convert(encode(x, scheme_of("f32")), scheme)):
        with pytest.raises(UnsupportedError, match="q8_0, q4_0, q6_k"):
            attempt(torch.ones(1, 256), scheme_of(name))


def test_bad_arguments_are_refused() -> None:
    q4_0, weight = scheme_of("q4_0"), torch.ones(2, 64)
    with pytest.raises(InvalidInputError, match="no multiple"):
        encode(torch.ones(2, 33), q4_0)
    with pytest.raises(InvalidInputError, match="shape"):
        encode(torch.tensor(1.0), scheme_of("f32"))
    with pytest.raises(InvalidInputError, match="method"):
        encode(weight, q4_0, method="best")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="importance"):
        encode(weight, q4_0, importance=torch.ones(64))
    for bad in (torch.ones(63), torch.ones(2, 64), -torch.ones(64), torch.full((64,), torch.nan)):
        with pytest.raises(InvalidInputError, match="64 channels"):
            encode(weight, q4_0, method="search", importance=bad)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENCODABLE)
def test_a_gpu_writes_and_reads_the_same_bytes(name: str) -> None:
    weight = torch.randn(64, 512)
    q = encode(weight.cuda(), scheme_of(name))
    np.testing.assert_array_equal(q.data, encode(weight, scheme_of(name)).data)
    assert torch.equal(decode(q, device="cuda").cpu(), decode(q))
