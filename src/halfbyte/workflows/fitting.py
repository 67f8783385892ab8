"""Which mode of training fits into the memory that there is, by its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.errors import DoesNotFitError
from halfbyte.planner.probe import this_machine
from halfbyte.planner.solve import Model
from halfbyte.planner.training import Training
from halfbyte.planner.ways import TrainingPlan, plan_training
from halfbyte.training.modes import Mode
from halfbyte.workflows.asking import Distilling
from halfbyte.workflows.material import Material

# What a planner calls the modes; by default the first that fits, the best ones first.
PLANNED: dict[Mode, Any] = {
    "full": "qat",
    "lora": "qat-lora",
    "scales": "scales",
    "blockwise": "blockwise",
    "adapter": "adapter",
}
AUTO: Sequence[Mode] = ("full", "lora", "scales", "blockwise")


def fitting(material: Material, asked: Distilling) -> tuple[Mode, TrainingPlan]:
    """The mode that was asked for, or the first that fits. Raises `DoesNotFitError`."""
    modes: Sequence[Mode] = AUTO if asked.mode == "auto" else [asked.mode]
    plans: list[tuple[Mode, TrainingPlan]] = [(it, _plan(material, asked, it)) for it in modes]
    for mode, plan in plans:
        if plan.fits or (asked.mode != "auto" and asked.budget is None):
            return mode, plan
    smallest, least = min(plans, key=lambda found: found[1].total())
    raise DoesNotFitError(
        f"{smallest} takes {least.total() / 1e9:.2f} GB, "
        f"there are {least.budget_bytes / 1e9:.2f} GB",
        where="--budget",
        hint="a smaller --at-once or --window, or --small",
    )


def own_bytes(plan: TrainingPlan) -> int:
    """What a plan counts of the training itself, where it is computed."""
    own = (cost for cost in plan.costs if cost.place == "device")
    return sum(cost.bytes for cost in own if not cost.component.startswith("runtime."))


def _plan(material: Material, asked: Distilling, mode: Mode) -> TrainingPlan:
    adapting = mode == "adapter"
    model = Model(
        name=material.place.name,
        spec=material.original.spec,
        schemes=material.schemes if adapting else material.original.schemes,
        quantized=adapting,
    )
    training = Training(
        mode=PLANNED[mode],
        batch=asked.at_once,
        length=asked.mix.length,
        precision="bf16" if asked.small else "fp32",
        optimizer="adamw-8bit" if asked.small else "adamw",
        checkpointing=asked.again,
        curvature=asked.curvature > 0 and not asked.task,
        rank=asked.rank,
        targets=tuple(asked.targets),
        recipe=asked.recipe,
        tokens=asked.mix.count * asked.mix.length,
    )
    kind = "cuda" if material.oracle.device.startswith("cuda") else "cpu"
    return plan_training(model, this_machine(kind), training, budget_bytes=asked.budget)
