"""The knapsack against all choices there are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from halfbyte.quantizer import allocate
from halfbyte.quantizer.allocate import Option, front, within


def groups(seed: int, count: int) -> list[list[Option]]:
    chance = np.random.default_rng(seed)
    return [
        [
            Option(f"s{i}", int(size), float(cost))
            for i, (size, cost) in enumerate(
                zip(chance.integers(1, 60, 3), chance.integers(0, 40, 3), strict=True)
            )
        ]
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_every_budget_gets_the_best_choice(seed: int) -> None:
    options = groups(seed, 6)
    points = front(options)
    everything = [
        (sum(o.bytes for o in choice), sum(o.cost for o in choice)) for choice in product(*options)
    ]
    for budget in range(0, max(size for size, _ in everything) + 2):
        fitting = [cost for size, cost in everything if size <= budget]
        found = within(points, budget)
        assert (found.cost if found else None) == (min(fitting) if fitting else None)
        if found:
            picked = [o[i] for o, i in zip(options, found.chosen, strict=True)]
            assert (found.bytes, found.cost) == (
                sum(o.bytes for o in picked),
                sum(o.cost for o in picked),
            )
            assert found.bytes <= budget


def test_with_fewer_states_it_is_nearly_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    options = groups(9, 60)
    exact = front(options)
    monkeypatch.setattr(allocate, "KEPT", 200)
    thinned = front(options)
    assert len(thinned) <= 201 < len(exact)
    for budget in range(exact[0].bytes, exact[-1].bytes, 37):
        best, found = within(exact, budget), within(thinned, budget)
        assert best and found and found.bytes <= budget
        assert found.cost <= best.cost * 1.05 + 5
