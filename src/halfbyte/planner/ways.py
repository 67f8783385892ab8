"""Every way to train a model on a machine: its plan, the others beside it, and the rules of thumb.

A plan speaks of one GPU's memory; what lies in the host or on a disk is told apart. On a machine
without a GPU the host is the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from halfbyte.errors import InvalidInputError
from halfbyte.planner.calibration import PROCESS_BYTES
from halfbyte.planner.grid_training import costs_on_grid
from halfbyte.planner.runtimes import CUDA_BYTES
from halfbyte.planner.solve import MARGIN, Model, schemes_of
from halfbyte.planner.training import (
    MODES,
    NUMBERS,
    OURS,
    PLAIN,
    Constants,
    Cost,
    Optimizer,
    Place,
    Precision,
    Training,
    costs,
    states,
)
from halfbyte.specs import Machine, ModelSpec, Scheme

PACKED = ("qlora", "adapter")  # what begins with weights that are quantized


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """A training of a model on a machine, and its ledger. `fits` speaks of one GPU's budget."""

    model: str
    machine: str
    training: Training
    costs: tuple[Cost, ...]
    budget_bytes: int

    def total(self, place: Place = "device") -> int:
        return sum(cost.bytes for cost in self.costs if cost.place == place)

    @property
    def fits(self) -> bool:
        return self.total() <= self.budget_bytes

    def document(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "fits": self.fits,
            "total_bytes": self.total(),
            "host_bytes": self.total("host"),
            "disk_bytes": self.total("disk"),
            **asdict(self),
        }


def plan_training(
    model: Model,
    machine: Machine,
    training: Training,
    *,
    budget_bytes: int | None = None,
    constants: Constants = PLAIN,
) -> TrainingPlan:
    """The plan of a training. Raises `InvalidInputError` for one that the model cannot have."""
    schemes = model.schemes if model.quantized else schemes_of(model.spec, training.recipe)
    if model.quantized and training.mode not in PACKED:
        raise InvalidInputError(
            f"--train {training.mode} begins with weights that are not quantized",
            where=model.name,
            hint="name the original, or --train qlora or adapter",
        )
    budget = machine.memory_bytes if budget_bytes is None else budget_bytes
    own = [*costs_of(model.spec, schemes, training, constants)]
    if machine.kind == "cpu":
        own = [replace(cost, place="device") if cost.place == "host" else cost for cost in own]
    return TrainingPlan(
        model=model.name,
        machine=machine.name,
        training=training,
        costs=(*own, *_around(machine, constants, budget, given=budget_bytes is not None)),
        budget_bytes=budget,
    )


def costs_of(
    spec: ModelSpec, schemes: Mapping[str, Scheme], training: Training, constants: Constants = PLAIN
) -> Iterator[Cost]:
    """Every cost of a training. `schemes` is how a frozen body, or the result, is stored.

    Raises `InvalidInputError` for sequences beyond the model's context.
    """
    if training.length > spec.context:
        raise InvalidInputError(
            f"sequences of {training.length} are beyond the model's {spec.context}",
            hint=f"give --seq {spec.context} or less",
        )
    if training.mode in OURS:
        yield from costs_on_grid(spec, schemes, training)
    else:
        yield from costs(spec, schemes, training, constants)


def _around(machine: Machine, constants: Constants, budget: int, *, given: bool) -> Iterable[Cost]:
    """What is there without the training."""
    cuda = machine.kind == "cuda"
    library = constants.overhead_bytes + (CUDA_BYTES if cuda else PROCESS_BYTES)
    name, note = ("cuda_context", "a CUDA context and its libraries") if cuda else ("process", "")
    yield Cost(component=f"runtime.{name}", bytes=library, basis="calibrated", note=note)
    if not given and machine.used_bytes:
        yield Cost(
            component="runtime.other_processes",
            bytes=machine.used_bytes,
            basis="calibrated",
            note="in use now",
        )
    yield Cost(
        component="runtime.margin",
        bytes=int(MARGIN * budget),
        basis="calibrated",
        note=f"{MARGIN:.0%} of the budget, left free",
    )


def other_ways(model: Model, training: Training) -> Iterable[Training]:
    """The same batch trained in every other way that there is on as many GPUs."""
    for mode in MODES:
        alone = mode in OURS
        possible = mode in PACKED if model.quantized else True
        if mode == training.mode or not possible or (alone and training.gpus > 1):
            continue
        zero = 0 if alone else min(training.zero, 2) if mode == "qlora" else training.zero
        offload = (
            "none" if not zero or (training.offload == "nvme" and zero < 3) else training.offload
        )
        yield replace(training, mode=mode, targets=(), zero=zero, offload=offload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule of thumb, as this arithmetic gives it, and what it leaves out."""

    name: str
    bytes: int
    leaves_out: str


def rules_of_thumb(parameters: int) -> tuple[Rule, ...]:
    """What people reckon with, for a number of parameters."""
    loaded = "scales and wider embeddings, the cache, activations, the runtime"
    trained_ = "activations, logits, buffers, the runtime"
    fp32 = sum_of(parameters, "fp32", "adamw")
    mixed = sum_of(parameters, "mixed", "adamw")
    eight = sum_of(parameters, "mixed", "adamw-8bit")
    gradients = NUMBERS["mixed"][1] * parameters
    return (
        Rule(name="loaded in fp16: 2 bytes", bytes=2 * parameters, leaves_out=loaded),
        Rule(name="loaded in int8: 1 byte", bytes=parameters, leaves_out=loaded),
        Rule(name="loaded in int4: 1/2 byte", bytes=parameters // 2, leaves_out=loaded),
        Rule(name="AdamW in fp32: 4 x 4 bytes", bytes=fp32, leaves_out=trained_),
        Rule(name="AdamW, mixed: 16 bytes", bytes=mixed, leaves_out=trained_),
        Rule(
            name="between steps: 14 bytes, 7 x loaded",
            bytes=mixed - gradients,
            leaves_out=f"gradients, {trained_}",
        ),
        Rule(
            name="with 8-bit states: 10 bytes, 5 x loaded",
            bytes=eight,
            leaves_out=trained_,
        ),
    )


def sum_of(count: int, precision: Precision, optimizer: Optimizer) -> int:
    """Weights, gradients, master copies and states of `count` numbers on one device."""
    training = Training(mode="full", precision=precision, optimizer=optimizer)
    return sum(cost.bytes for cost in states(count, training))
