"""A planned training in the words of the engines that run it: DeepSpeed's JSON, Accelerate's YAML.

What a plan counts as buffers is what is written here, so that both hold together. What it is not: a
launcher; learning rates and data stay with the trainer.

Sources: https://www.deepspeed.ai/docs/config-json, and what `accelerate config` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from halfbyte.errors import InvalidInputError
from halfbyte.planner.training import BUCKET, OURS, PREFETCH, Training

SWAP = "offloaded"  # the folder on a disk, relative to where the training is started
CLIP = 1.0


def deepspeed(training: Training, live: int) -> dict[str, Any]:
    """The configuration of DeepSpeed; with ZeRO 3, `live` weights are gathered at most.

    Raises `InvalidInputError` for ways it does not train.
    """
    _refuse_ours(training)
    precision = {"bf16": {"enabled": True}} if training.precision != "fp32" else {}
    if training.precision == "bf16" and training.zero:
        raise InvalidInputError(
            "DeepSpeed keeps master copies in fp32", hint="--precision mixed, or no --zero"
        )
    client = {"zero_allow_untested_optimizer": True} if training.optimizer != "adamw" else {}
    return {
        "train_micro_batch_size_per_gpu": training.batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": training.batch * training.gpus,
        "gradient_clipping": CLIP,
        **precision,
        **client,
        "zero_optimization": _zero(training, live),
    }


def _zero(training: Training, live: int) -> dict[str, Any]:
    stage: dict[str, Any] = {"stage": training.zero}
    if training.zero:
        stage |= {
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        }
    if training.zero == 3:
        stage |= {
            "stage3_prefetch_bucket_size": PREFETCH,
            "stage3_max_live_parameters": live,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if training.offload != "none":
        where = {"device": training.offload, "pin_memory": True}
        if training.offload == "nvme":
            where["nvme_path"] = SWAP
        stage["offload_optimizer"] = where
        if training.zero == 3:
            stage["offload_param"] = where
    return stage


def accelerate(training: Training) -> dict[str, Any]:
    """The configuration of Accelerate; with ZeRO it starts DeepSpeed."""
    _refuse_ours(training)
    kind = "MULTI_GPU" if training.gpus > 1 else "NO"
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "DEEPSPEED" if training.zero else kind,
        "mixed_precision": "bf16" if training.precision == "mixed" else "no",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": training.gpus,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    if training.zero:
        config["deepspeed_config"] = {
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "zero_stage": training.zero,
            "offload_optimizer_device": training.offload,
            "offload_param_device": training.offload if training.zero == 3 else "none",
            "zero3_init_flag": training.zero == 3,
            "zero3_save_16bit_model": training.zero == 3,
        }
        if training.offload == "nvme":
            paths = {"offload_optimizer_nvme_path": SWAP, "offload_param_nvme_path": SWAP}
            config["deepspeed_config"] |= paths
    return config


def written(name: str, training: Training, live: int) -> str:
    """The text of a file of that name: .json is DeepSpeed's, .yaml or .yml Accelerate's."""
    if name.endswith(".json"):
        return json.dumps(deepspeed(training, live), indent=2) + "\n"
    if name.endswith((".yaml", ".yml")):
        return "".join(_yaml(accelerate(training)))
    raise InvalidInputError(
        f"'{name}' is neither .json nor .yaml",
        hint="deepspeed.json for DeepSpeed, accelerate.yaml for Accelerate",
    )


def _yaml(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Lines of a table of words, numbers and tables of them. JSON's values are YAML's."""
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:\n", *_yaml(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
    return lines


def _refuse_ours(training: Training) -> None:
    if training.mode in OURS:
        raise InvalidInputError(
            f"{training.mode} is no way that DeepSpeed or Accelerate train",
            hint="leave out --emit",
        )
