"""The training loop: it learns, resumes to the bit after a kill, and keeps the best."""

from __future__ import annotations

import subprocess
import sys
from math import inf
from pathlib import Path
from time import sleep

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_job import Fitting, fit

from halfbyte.errors import IntegrityError
from halfbyte.training.adamw import AdamW
from halfbyte.training.checkpoints import restore, save
from halfbyte.training.loop import STATE, Standing
from halfbyte.training.order import Order
from halfbyte.training.schedule import Schedule

STEPS = 60


class Stopped(Exception):
    pass


def stop_at(step: int):
    def tell(standing: Standing) -> None:
        if standing.step == step:
            raise Stopped

    return tell


def same(one: Fitting, other: Fitting) -> bool:
    mine, its = one.parameters, other.parameters
    return all(torch.equal(mine[name], its[name]) for name in mine)


def test_it_learns_and_tells(tmp_path: Path) -> None:
    told: list[Standing] = []
    fitting, outcome = fit(tmp_path / "work", STEPS, tell=told.append)
    assert outcome.ended == "done" and outcome.steps == STEPS == len(told)
    assert outcome.best < 0.2 * outcome.before and outcome.best_step > 0
    assert outcome.best == fitting.measure()
    assert outcome.tokens == 48 * STEPS
    last = told[-1]
    assert last.left_s == 0 and last.tokens_per_s > 0 and last.best == outcome.best
    assert last.loss < told[0].loss < inf


@pytest.mark.parametrize("step", [1, 9, 10, 37, STEPS])
def test_it_goes_on_to_the_same_bits(tmp_path: Path, step: int) -> None:
    whole, ended = fit(tmp_path / "whole", STEPS)
    with pytest.raises(Stopped):
        fit(tmp_path / "work", STEPS, tell=stop_at(step))
    resumed, outcome = fit(tmp_path / "work", STEPS)
    assert same(whole, resumed)
    assert (outcome.best, outcome.best_step, outcome.tokens) == (
        ended.best,
        ended.best_step,
        ended.tokens,
    )


def test_a_kill_costs_nothing_but_time(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("training_job.py"))]

    def start(folder: str, pause: float) -> subprocess.Popen[bytes]:
        arguments = [tmp_path / folder, STEPS, tmp_path / f"{folder}.npz", pause]
        return subprocess.Popen([*command, *map(str, arguments)])

    assert start("whole", 0.0).wait() == 0
    for _ in range(3):
        running = start("killed", 0.02)
        for _ in range(600):
            if (tmp_path / "killed" / STATE).exists():
                break
            sleep(0.05)
        sleep(0.1)
        running.kill()
        running.wait()
    assert not (tmp_path / "killed.npz").exists()
    assert start("killed", 0.0).wait() == 0
    both = [Fitting(), Fitting()]
    facts = [
        restore(tmp_path / f"{name}.npz", it.parameters)
        for name, it in zip(("whole", "killed"), both, strict=True)
    ]
    assert same(*both) and facts[0] == facts[1]


def test_a_loss_that_is_no_number_ends_it_at_the_best(tmp_path: Path) -> None:
    fitting, outcome = fit(tmp_path / "work", STEPS, spoil=35)
    assert outcome.ended == "diverged" and outcome.steps == 35
    assert fitting.measure() == outcome.best < outcome.before


def test_a_run_that_blows_up_ends_at_the_best(tmp_path: Path) -> None:
    fitting, outcome = fit(tmp_path / "work", STEPS, rate=50.0)
    assert outcome.ended == "diverged" and outcome.steps < STEPS
    assert fitting.measure() == outcome.best <= outcome.before


def test_another_job_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path / "work", STEPS, tell=stop_at(40))
    told: list[Standing] = []
    fit(tmp_path / "work", STEPS, rate=0.01, tell=told.append)
    assert told[0].step == 1


def test_what_is_restored_is_what_was_saved(tmp_path: Path) -> None:
    held = {
        "wide": torch.randn(3, 5).to(torch.bfloat16),
        "whole": torch.arange(7),
        "one": torch.tensor(0.1),
    }
    save(tmp_path / "x.npz", held, {"step": 3, "measure": inf})
    again = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
    assert restore(tmp_path / "x.npz", again) == {"step": 3, "measure": inf}
    assert all(torch.equal(held[name], again[name]) for name in held)
    with pytest.raises(IntegrityError, match="other tensors: wide"):
        restore(tmp_path / "x.npz", {name: held[name] for name in ("whole", "one")})
    with pytest.raises(IntegrityError, match="56 bytes for a tensor of 48"):
        restore(tmp_path / "x.npz", {**again, "whole": torch.arange(6)})


@given(count=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 9))
def test_every_epoch_has_every_sample_once(count: int, batch: int, seed: int) -> None:
    order = Order(count=count, batch=batch, seed=seed)
    flat = [sample for step in range(2 * count) for sample in order.of(step)]
    assert len(flat) == 2 * count * batch
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))
    assert order.of(count) == Order(count=count, batch=batch, seed=seed).of(count)


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(steps=100, rate=2.0, warmup=10, final=0.1)
    rates = [schedule.at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0
    assert max(rates) == 2.0 and rates[-1] == pytest.approx(0.2)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_adamw_is_torchs() -> None:
    ours, theirs = ({"w": torch.ones(4, 3, requires_grad=True)} for _ in range(2))
    optimizer = AdamW(parameters=ours, decay=0.1)
    oracle = torch.optim.AdamW(theirs.values(), lr=0.03, betas=(0.9, 0.95), weight_decay=0.1)
    chance = torch.Generator().manual_seed(1)
    for step in range(20):
        gradient = torch.randn(4, 3, generator=chance)
        ours["w"].grad, theirs["w"].grad = gradient.clone(), gradient.clone()
        optimizer.step(step, 0.03)
        oracle.step()
    assert torch.allclose(ours["w"], theirs["w"], rtol=1e-6, atol=1e-7)
