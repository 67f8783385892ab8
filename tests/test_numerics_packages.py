"""The layouts of other packages, against plain numpy written from what they document.

compressed-tensors and GPTQ for groups of four-bit integers, bitsandbytes for nf4 and int8.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.numerics import QTensor, nf4
from halfbyte.numerics.affine import AFFINE
from halfbyte.numerics.codec import convert, convert_exactly, decode, encode
from halfbyte.specs import SCHEMES, scheme_of

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def _weights(rows: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(5, (rows, width)) * 0.02).astype(np.float32)


def _rounded(scale: np.ndarray, name: str) -> np.ndarray:
    kind = torch.float16 if name.endswith("-f16") else torch.bfloat16
    return torch.from_numpy(scale).to(kind).float().numpy()


def _pack_quantized(integers: np.ndarray) -> np.ndarray:
    """int32 words [n, K / 8] of four-bit numbers, the first in the lowest bits."""
    words = np.zeros((len(integers), integers.shape[1] // 8), np.uint32)
    for place in range(8):
        words |= (integers[:, place::8].astype(np.uint32) & 15) << np.uint32(4 * place)
    return words.view(np.int32)


@pytest.mark.parametrize("name", AFFINE)
def test_groups_of_integers_are_laid_out_as_compressed_tensors_packs_them(name: str) -> None:
    x = _weights(6, 384)
    group = scheme_of(name).block
    groups = x.reshape(6, -1, group)
    if name.startswith("uint4"):
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scale = _rounded((high - low) / 15, name)
        zero = np.round(-low / scale).clip(0, 15)
    else:
        scale = _rounded(np.abs(groups).max(-1) / np.float32(7.5), name)
        zero = np.full_like(scale, 8)
    integers = (np.round(groups / scale[..., None]) + zero[..., None]).clip(0, 15).astype(int)

    q = encode(torch.from_numpy(x), scheme_of(name))
    blocks = q.data.reshape(6, -1, q.scheme.block_bytes)
    kind = np.float16 if name.endswith("-f16") else np.uint16
    stored = np.ascontiguousarray(blocks[..., :2]).view(kind)[..., 0]
    if kind == np.uint16:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(stored.astype(np.float32), scale)
    if name.startswith("uint4"):
        np.testing.assert_array_equal(blocks[..., 2], zero)
    words = np.ascontiguousarray(blocks[..., -group // 2 :]).reshape(6, -1).view(np.int32)
    np.testing.assert_array_equal(words, _pack_quantized(integers.reshape(6, -1)))
    meant = (integers - zero[..., None]).astype(np.float32) * scale[..., None]
    np.testing.assert_array_equal(decode(q).numpy(), meant.reshape(6, -1))


@pytest.mark.parametrize("name", AFFINE)
def test_every_scale_we_choose_is_held_by_fp16(name: str) -> None:
    x = torch.from_numpy(_weights(8, 512)) * torch.logspace(-7, 4, 8)[:, None]
    for method in ("rtn", "search"):
        q = encode(x, scheme_of(name), method=method)
        held = convert(q, scheme_of("q8_0" if name.startswith("uint4") else "q4_0"))
        assert torch.equal(decode(held), decode(q))


def test_a_scale_that_fp16_lacks_is_kept_in_f32() -> None:
    q = encode(torch.ones(2, 64), scheme_of("int4-g32"))
    q.data[1, :2] = np.array([3, 0x33], np.uint8)  # 3.05e-8 in bf16
    with pytest.raises(UnsupportedError, match="no number in fp16"):
        convert(q, scheme_of("q4_0"))
    held = convert_exactly(q, scheme_of("q4_0"))
    assert held.scheme.name == "f32" and torch.equal(decode(held), decode(q))


@pytest.mark.parametrize(
    ("name", "best"),
    [("int4-g32", 0.656), ("int4-g128", 0.95), ("uint4-g32", 0.60), ("uint4-g128", 0.905)],
)
@pytest.mark.parametrize("suffix", ["", "-f16"])
def test_what_a_search_is_worth(name: str, best: float, suffix: str) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 1024), np.float32))

    def percent(method: str) -> float:
        error = decode(encode(x, scheme_of(name + suffix), method=method)) - x  # type: ignore[arg-type]
        return 100 * float(error.square().sum() / x.square().sum())

    assert percent("search") < best < percent("rtn")


def _dynamic() -> np.ndarray:
    """The dynamic 8-bit type: decades cut into 1, 2, 4 ... 64 parts."""
    levels = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1).numpy()
        middles = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        levels += [*middles.tolist(), *(-middles).tolist()]
    return np.sort(np.array(levels, np.float32))


def _nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.abs(x[..., None].astype(np.float64) - levels.astype(np.float64)).argmin(-1)


@pytest.mark.parametrize(
    ("rows", "width"), [(1, 64), (37, 192), (5, 16384), (300, 128), (3, 16448), (4, 33024)]
)
def test_nf4_is_laid_out_as_bitsandbytes_does_it(rows: int, width: int) -> None:
    """Blocks of 64 and spans of 256 blocks through the whole tensor, wherever rows end."""
    x = _weights(rows, width, seed=width)
    blocks = x.reshape(-1, 64)
    largest = np.abs(blocks).max(1)
    offset = torch.from_numpy(largest).mean().numpy()
    deviations = largest - offset
    spans = [deviations[i : i + 256] for i in range(0, len(deviations), 256)]
    outer = np.array([np.abs(span).max() for span in spans], np.float32)
    levels = np.concatenate(
        [
            _nearest(span / max(top, 1e-38), _dynamic())
            for span, top in zip(spans, outer, strict=True)
        ]
    ).astype(np.uint8)
    nibbles = _nearest(blocks / largest[:, None], np.array(NF4)).reshape(-1, 2)
    pairs = (nibbles[:, 0] * 16 + nibbles[:, 1]).astype(np.uint8).reshape(rows, -1)

    tensors = (torch.from_numpy(part) for part in (pairs, levels, outer))
    theirs = nf4.rows_of(*tensors, torch.from_numpy(offset)).numpy()
    stored = _dynamic()[levels] * np.repeat(outer, 256)[: len(levels)] + offset
    meant = np.array(nf4.LEVELS, np.float32)[nibbles.reshape(-1, 64)] * stored[:, None]
    scheme = scheme_of("nf4")
    assert theirs.shape == (rows, scheme.row_bytes(width))
    np.testing.assert_array_equal(
        decode(QTensor(scheme, x.shape, theirs)).numpy(), meant.reshape(x.shape)
    )
    np.testing.assert_array_equal(encode(torch.from_numpy(x), scheme).data, theirs)


def test_the_levels_of_nf4() -> None:
    np.testing.assert_array_equal(nf4.dynamic_levels().numpy(), _dynamic())
    assert len(set(nf4.dynamic_levels().tolist())) == 256
    np.testing.assert_allclose(nf4.LEVELS, NF4, rtol=1e-6, atol=0)


def test_int8_rows_are_those_of_bitsandbytes() -> None:
    x = _weights(9, 200)
    largest = np.abs(x).max(1, keepdims=True)
    integers = np.round(x * (np.float32(127) / largest)).astype(np.int8)
    q = encode(torch.from_numpy(x), scheme_of("int8"))
    np.testing.assert_array_equal(q.data[:, :4].copy().view(np.float32), largest)
    np.testing.assert_array_equal(q.data[:, 52:].view(np.int8), integers)
    meant = integers * largest * np.float32(7.874015718698502e-3)
    np.testing.assert_array_equal(decode(q).numpy(), meant)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True), st.integers(0, 99))
def test_columns_of_importance_stay_out_of_int8(columns: list[int], seed: int) -> None:
    x = torch.from_numpy(_weights(5, 41, seed)).half().float()
    x[:, columns] *= 64
    importance = torch.full((41,), 1e-6)
    importance[columns] = 50.0
    q = encode(x, scheme_of("int8"), method="search", importance=importance)
    weights = decode(q)
    assert torch.equal(weights[:, columns], x[:, columns])
    rest = [column for column in range(41) if column not in columns]
    bound = x[:, rest].abs().amax(1, keepdim=True) / 254 * 1.001
    assert bool(((weights - x)[:, rest].abs() <= bound).all())


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_rows_stand_alone(name: str) -> None:
    """Slices and permutations of rows keep their values, though spans run through the tensor."""
    x = torch.from_numpy(_weights(40, 128))
    q = encode(x, scheme_of(name))
    order = np.random.default_rng(1).permutation(40)
    assert torch.equal(decode(q.take_rows(order)), decode(q)[torch.from_numpy(order)])
    assert torch.equal(decode(q.rows(7, 19)), decode(q)[7:19])
    stacked = encode(x.view(4, 10, 128), scheme_of(name))
    np.testing.assert_array_equal(stacked.data, q.data)
    assert stacked.shape == (4, 10, 128)


def test_sizes_are_exact() -> None:
    def bits(name: str, width: int) -> float:
        return 8 * SCHEMES[name].bytes((1, width)) / width

    assert [bits(name, 4096) for name in ("int4-g32", "int4-g128", "uint4-g128")] == [
        4.5, 4.125, 4.1875,
    ]  # fmt: skip
    assert bits("nf4", 16384) == 4.125 + 8 * 16 / 16384
    assert bits("int8", 4096) == 8 + 8 * 52 / 4096
    with pytest.raises(InvalidInputError, match="64"):
        encode(torch.ones(2, 96), scheme_of("nf4"))
