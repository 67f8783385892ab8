"""The calibrated methods on one layer with correlated inputs, measured on inputs they never saw."""

from __future__ import annotations

import pytest
from ptq_layer import METHODS, Layer, layer

from halfbyte.specs import scheme_of


@pytest.fixture(scope="module")
def correlated() -> Layer:
    return layer(0, outputs=128)


def test_each_method_is_worth_its_name(correlated: Layer) -> None:
    weight, hessian, _ = correlated
    left = {
        name: correlated.error(method(weight, hessian, scheme_of("q4_0")))
        for name, method in METHODS.items()
        if name != "signround"
    }
    assert left["rtn"] == pytest.approx(0.745, abs=0.02)
    assert left["search"] == pytest.approx(0.656, abs=0.02)
    assert left["weighted"] == pytest.approx(0.427, abs=0.02)
    assert left["awq"] < 0.35
    assert left["gptq-plain"] < 0.30
    assert left["gptq-ordered"] < 0.24
    assert left["gptq"] < 0.985 * left["gptq-ordered"]


@pytest.mark.parametrize(
    ("scheme", "best"),
    [("q8_0", 0.001), ("q6_k", 0.0095), ("int4-g128", 0.41), ("uint4-g32", 0.205)],
)
def test_every_grid_gains(correlated: Layer, scheme: str, best: float) -> None:
    weight, hessian, _ = correlated
    left = {
        name: correlated.error(METHODS[name](weight, hessian, scheme_of(scheme)))
        for name in ("rtn", "weighted", "gptq")
    }
    assert left["gptq"] < best
    assert left["gptq"] < 0.6 * left["weighted"] < 0.6 * left["rtn"]


def test_signround_learns(correlated: Layer) -> None:
    few = correlated._replace(weight=correlated.weight[:32])
    left = {
        name: few.error(METHODS[name](few.weight, few.hessian, scheme_of("q4_0")))
        for name in ("weighted", "signround")
    }
    assert left["signround"] < 0.92 * left["weighted"]
