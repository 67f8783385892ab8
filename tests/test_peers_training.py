"""Plans for training beside the engines that run them: their loaders, and their own estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.planner.engines import deepspeed, written
from halfbyte.planner.training import Offload, Training, states

pytestmark = pytest.mark.peers
BILLION = 10**9
WAYS: tuple[tuple[int, int, Offload], ...] = (
    (1, 0, "none"),
    (4, 0, "none"),
    (4, 1, "none"),
    (4, 2, "cpu"),
    (8, 3, "none"),
    (8, 3, "cpu"),
    (2, 3, "nvme"),
)


def training(gpus: int, zero: int, offload: Offload, **more: Any) -> Training:
    return Training(mode="full", gpus=gpus, zero=zero, offload=offload, **more)


@pytest.mark.parametrize(("gpus", "zero", "offload"), WAYS)
def test_deepspeed_takes_what_is_written(
    monkeypatch: pytest.MonkeyPatch, gpus: int, zero: int, offload: Offload
) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra 'peers'")
    from deepspeed.runtime import config as settings

    monkeypatch.setattr(settings.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(settings.dist, "get_world_size", lambda: gpus)
    planned = training(gpus, zero, offload, batch=2)
    read = settings.DeepSpeedConfig(deepspeed(planned, live=10**8))
    assert read.zero_config.stage == zero
    assert read.train_batch_size == 2 * gpus
    assert read.bfloat16_config.enabled
    if offload != "none":
        assert read.zero_config.offload_optimizer.device == offload


@pytest.mark.parametrize(("gpus", "zero", "offload"), WAYS)
def test_accelerate_takes_what_is_written(
    tmp_path: Path, gpus: int, zero: int, offload: Offload
) -> None:
    pytest.importorskip("accelerate", reason="needs the extra 'peers'")
    from accelerate.commands.config.config_args import load_config_from_file

    file = tmp_path / "accelerate.yaml"
    file.write_text(written(file.name, training(gpus, zero, offload), live=1), encoding="utf-8")
    read = load_config_from_file(str(file))
    assert read.num_processes == gpus
    assert str(read.mixed_precision) == "bf16"
    kind = "DEEPSPEED" if zero else "MULTI_GPU" if gpus > 1 else "NO"
    assert getattr(read.distributed_type, "value", read.distributed_type) == kind
    assert (read.deepspeed_config or {}).get("zero_stage", 0) == zero


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_zero_2_takes_what_deepspeed_estimates(gpus: int, offload: Offload) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra 'peers'")
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    host, device = estimate_zero2_model_states_mem_needs(
        8 * BILLION, gpus, 1, cpu_offload=offload == "cpu", additional_buffer_factor=1.0
    )
    found = [*states(8 * BILLION, training(gpus, 2, offload))]
    assert sum(cost.bytes for cost in found if cost.place == "device") == device
    if offload == "cpu" and gpus <= 4:
        assert sum(cost.bytes for cost in found if cost.place == "host") == host


@pytest.mark.parametrize("gpus", [1, 4])
def test_zero_3_in_the_host_takes_what_deepspeed_estimates(gpus: int) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra 'peers'")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    host, _, _ = estimate_zero3_model_states_mem_needs(
        8 * BILLION, 0, gpus, 1, cpu_offload=True, cpu_offload_params=True,
        additional_buffer_factor=1.0,
    )  # fmt: skip
    found = [*states(8 * BILLION, training(gpus, 3, "cpu"))]
    assert sum(cost.bytes for cost in found if cost.place == "host") == host
