"""Encoders that choose: what they gain, and that no block ever loses."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from halfbyte.numerics import QTensor
from halfbyte.numerics.codec import Method, decode, encode
from halfbyte.specs import scheme_of

SEARCHED = ["q4_0", "q8_0", "q6_k"]


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((512, 2048), np.float32))


@pytest.fixture(scope="module")
def heavy_tailed() -> Tensor:
    """Student-t with five degrees of freedom, which weights of language models resemble."""
    return torch.from_numpy(np.random.default_rng(0).standard_t(5, (512, 2048)).astype(np.float32))


def _error(x: Tensor, name: str, method: Method, importance: Tensor | None = None) -> Tensor:
    """Squared error per block of the scheme, f64 [blocks]; weighted if `importance` is given."""
    q = encode(x, scheme_of(name), method=method, importance=importance)
    squares = (decode(q).double() - x.double()).square()
    if importance is not None:
        squares *= importance.double()
    return squares.reshape(-1, q.scheme.block).sum(1)


def _percent(x: Tensor, name: str, method: Method) -> float:
    return 100 * float(_error(x, name, method).sum() / x.double().square().sum())


def test_q4_0_error_on_gaussian_weights(gaussian: Tensor) -> None:
    assert _percent(gaussian, "q4_0", "rtn") == pytest.approx(0.738, abs=0.004)
    assert _percent(gaussian, "q4_0", "search") <= 0.655


def test_q6_k_is_better_than_ggmls_encoder(gaussian: Tensor, heavy_tailed: Tensor) -> None:
    """ggml's quantize_row_q6_K_ref leaves 0.03145 % and 0.0459 % on such data."""
    assert _percent(gaussian, "q6_k", "rtn") < 0.0307
    assert _percent(heavy_tailed, "q6_k", "rtn") < 0.0447
    assert _percent(gaussian, "q6_k", "search") < 0.0291
    assert _percent(heavy_tailed, "q6_k", "search") < 0.0434


@pytest.mark.peers
def test_q6_k_beside_ggml_itself(gaussian: Tensor, heavy_tailed: Tensor) -> None:
    for x in (gaussian, heavy_tailed):
        theirs = decode(_ggml_q6_k(x)).double().sub_(x).square_().sum()
        for method in ("rtn", "search"):
            assert _error(x, "q6_k", method).sum() < 0.98 * theirs


def _ggml_q6_k(x: Tensor) -> QTensor:
    llama_cpp = pytest.importorskip("llama_cpp")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    scheme = scheme_of("q6_k")
    out = np.empty((x.shape[0], scheme.row_bytes(x.shape[1])), np.uint8)
    library.quantize_row_q6_K_ref(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(x.numel())
    )
    return QTensor(scheme, tuple(x.shape), out)


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_never_makes_a_block_worse(
    name: str, gaussian: Tensor, heavy_tailed: Tensor
) -> None:
    for x in (gaussian[:64], heavy_tailed[:64] * 1e-2, heavy_tailed[:64] * 1e-4):
        plain, searched = _error(x, name, "rtn"), _error(x, name, "search")
        assert bool((searched <= plain * (1 + 1e-5)).all())
        assert searched.sum() < 0.99 * plain.sum()


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (2, 256), elements=st.floats(-60000, 60000, width=32)))
def test_no_block_of_any_kind_gets_worse_or_leaves_its_bound(x: np.ndarray) -> None:
    weight = torch.from_numpy(x)
    for name, steps in (("q4_0", 8), ("q8_0", 127), ("q6_k", 30)):
        block = scheme_of(name).block
        plain = _error(weight, name, "rtn")
        bound = weight.double().reshape(-1, block).abs().amax(1) / steps + 4e-6
        assert bool((_error(weight, name, "search") <= plain * (1 + 1e-5) + 1e-30).all())
        assert bool((plain <= block * bound.square()).all())


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_rounding_again_changes_nothing(name: str, gaussian: Tensor) -> None:
    once = encode(gaussian, scheme_of(name))
    np.testing.assert_array_equal(encode(decode(once), scheme_of(name)).data, once.data)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("method", ["rtn", "search"])
def test_a_block_of_zeros_stays_zero(name: str, method: Method) -> None:
    weight = torch.randn(4, 512)
    weight[1, :256], weight[2] = 0.0, -0.0
    decoded = decode(encode(weight, scheme_of(name), method=method))
    assert not decoded[1, :256].any() and not decoded[2].any()
    assert bool(decoded[[0, 3]].any(dim=1).all())


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_moves_the_error_to_where_it_matters_less(name: str, gaussian: Tensor) -> None:
    x, importance = gaussian[:64], torch.rand(2048).pow(4) * 100
    blind = decode(encode(x, scheme_of(name), method="search")).sub_(x).square_() * importance
    assert _error(x, name, "search", importance).sum() < 0.97 * blind.double().sum()


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_is_relative(name: str, gaussian: Tensor) -> None:
    scheme, x, importance = scheme_of(name), gaussian[:16], torch.rand(2048)

    def data(importance: Tensor | None) -> np.ndarray:
        return encode(x, scheme, method="search", importance=importance).data

    np.testing.assert_array_equal(data(importance * 1024), data(importance))
    np.testing.assert_array_equal(data(torch.full((2048,), 0.3)), data(None))


@pytest.mark.parametrize("name", SEARCHED)
def test_blocks_of_no_importance_fall_back_on_the_plain_scale(name: str, gaussian: Tensor) -> None:
    x, importance = gaussian[:16], torch.rand(2048)
    importance[:512] = 0
    error = decode(encode(x, scheme_of(name), method="search", importance=importance)) - x
    assert error[:, :512].square().mean() < 1.3 * error[:, 512:].square().mean()
