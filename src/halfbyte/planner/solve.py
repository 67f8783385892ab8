"""From a goal to a plan: which recipe, which cache and how much context a budget allows.

Candidates are ordered by how true they are to the original. The first that reaches the context that
is wanted wins, and takes the longest context that fits; where none reaches it, the one with the
longest context does. So more budget never makes a plan worse, and more context never costs less.
What is offered is only what the runtime can run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from halfbyte.errors import DoesNotFitError, InvalidInputError, UnsupportedError
from halfbyte.formats.checkpoint import Pieces
from halfbyte.models.cache import DRAFT_ROWS
from halfbyte.planner.calibration import EMPTY, Store
from halfbyte.planner.cost import bytes_per_token, ledger
from halfbyte.planner.runtimes import Companion, runtime_of
from halfbyte.specs import (
    KVType,
    Machine,
    ModelSpec,
    Plan,
    Row,
    Scheme,
    Setup,
    recipe_of,
)

if TYPE_CHECKING:
    from halfbyte.formats.lora import Adapter

# Most faithful first.
RECIPE_ORDER = ("bf16", "q8_0", "q4_0", "q4_0-pure")
KV_ORDER: tuple[KVType, ...] = ("bf16", "q8_0")
# The context that a plan should reach where nobody asks for one.
USUAL_CONTEXT = 8192
STEP = 256  # contexts are found in these steps
BLOCK = 32  # of a q8_0 cache
MOST = DRAFT_ROWS - 1  # that a round drafts
MOST_SEQUENCES = 256
MARGIN = 0.02  # of the budget: what nobody counted
# Of a memory's measured or listed speed, what decoding reaches.
REACHED = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is asked of a plan; None leaves it to the plan: with `sequences` as many as fit, with
    `draft` as many as a round takes, or none where the drafter does not fit. `reference`: no native
    op set."""

    budget_bytes: int | None = None
    context: int | None = None
    recipe: str | None = None
    kv: KVType | None = None
    sequences: int | None = 1
    spare: int = 0
    draft: int | None = None
    reference: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a plan must know of a model: `quantized` says that it is run as it is stored.

    `pieces` are its tokenizer's; `adapters` are by the names that people give them; `left_out` are
    bytes that the checkpoint stores for parts that do not run, by component.
    """

    name: str
    spec: ModelSpec
    schemes: Mapping[str, Scheme]
    quantized: bool
    pieces: Pieces | None = None
    drafter: Companion | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict[str, "Adapter"])
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])


def solve(
    model: Model, machine: Machine, goal: Goal, store: Store = EMPTY
) -> tuple[Plan, list[Plan]]:
    """The best plan, and every alternative at the longest context that it allows. `store` is what
    was measured on this machine.

    Raises `DoesNotFitError`, naming the nearest thing that would fit, and `InvalidInputError` for a
    context beyond the model's.
    """
    limit = model.spec.context
    if goal.context is not None and goal.context > limit:
        raise InvalidInputError(
            f"a context of {goal.context} is beyond the model's {limit}",
            hint=f"give --context {limit} or less",
        )
    makers = [
        _Maker(model, machine, goal, store, recipe, kv, draft)
        for recipe in _recipes(model, goal)
        for kv in _caches(model, goal)
        for draft in _drafts(model, goal)
    ]
    wanted = goal.context or min(limit, USUAL_CONTEXT)
    longest = [maker.longest(limit) for maker in makers]
    plans = [maker.plan(found or wanted) for maker, found in zip(makers, longest, strict=True)]
    reaching = [i for i, found in enumerate(longest) if found >= wanted]
    if not reaching and (goal.context is not None or not any(longest)):
        raise _does_not_fit(makers, longest, wanted)
    best = reaching[0] if reaching else longest.index(max(longest))
    context = goal.context or longest[best]
    if goal.sequences is not None:
        return makers[best].plan(context), plans
    context = min(context, wanted)
    return makers[best].plan(context, makers[best].most_sequences(context)), plans


def unbounded(model: Model, machine: Machine, goal: Goal, store: Store = EMPTY) -> Plan:
    """The plan of exactly what is asked for, even where it does not fit."""
    assert goal.context is not None and goal.kv is not None and goal.draft is not None
    maker = _Maker(model, machine, goal, store, goal.recipe, goal.kv, goal.draft)
    return maker.plan(goal.context)


def _recipes(model: Model, goal: Goal) -> Sequence[str | None]:
    if goal.recipe is not None:
        return (goal.recipe,)
    return (None,) if model.quantized else RECIPE_ORDER


def _caches(model: Model, goal: Goal) -> Sequence[KVType]:
    """Those that the model's heads allow. `UnsupportedError` where another was asked for."""
    uneven = [
        layer.attention.head_dim for layer in model.spec.layers if layer.attention.head_dim % BLOCK
    ]
    if uneven and goal.kv == "q8_0":
        raise UnsupportedError(
            f"a q8_0 cache needs a head dim that is a multiple of {BLOCK}, not {uneven[0]}",
            hint="use --kv bf16",
        )
    every: list[KVType] = [kv for kv in KV_ORDER if kv != "q8_0" or not uneven]
    return every if goal.kv is None else (goal.kv,)


def _drafts(model: Model, goal: Goal) -> Sequence[int]:
    """Drafting changes no token, so it comes before a smaller cache or recipe, and goes first."""
    if goal.draft is not None:
        return (goal.draft,)
    return (MOST,) if model.drafter is None else (MOST, 0)


class _Maker:
    """Plans of one recipe, one kind of cache and one way to draft, for any context."""

    def __init__(
        self,
        model: Model,
        machine: Machine,
        goal: Goal,
        store: Store,
        recipe: str | None,
        kv: KVType,
        draft: int,
    ) -> None:
        self._model, self._machine, self._goal = model, machine, goal
        self.recipe = recipe
        self.kv: KVType = kv
        self.draft = draft
        self._drafter = _stored_in(model.drafter, recipe) if draft else None
        self._schemes = model.schemes if recipe is None else schemes_of(model.spec, recipe)
        self._runtime = runtime_of(
            machine.kind,
            model.spec,
            self._schemes,
            adapters=[*model.adapters.values()],
            reference=goal.reference,
        )
        self._calibration = store.of(machine.name, self._runtime.name)

    def plan(self, context: int, sequences: int | None = None) -> Plan:
        """`sequences` None: as many as are asked for, or one."""
        goal, machine, spec = self._goal, self._machine, self._model.spec
        setup = Setup(
            recipe=self.recipe,
            kv=self.kv,
            context=context,
            sequences=sequences or goal.sequences or 1,
            spare=goal.spare,
            draft=self.draft,
            drafter=None if self._drafter is None else self._drafter.name,
            adapters=tuple(self._model.adapters),
        )
        budget = machine.memory_bytes if goal.budget_bytes is None else goal.budget_bytes
        around = (
            Row(
                component="runtime.other_processes",
                bytes=machine.used_bytes if goal.budget_bytes is None else 0,
                basis="calibrated",
                note="in use now",
            ),
            Row(
                component="runtime.margin",
                bytes=int(MARGIN * budget),
                basis="calibrated",
                note=f"{MARGIN:.0%} of the budget, left free",
            ),
        )
        return Plan(
            model=self._model.name,
            machine=machine.name,
            ops=self._runtime.name,
            setup=setup,
            rows=(
                *ledger(
                    spec,
                    self._schemes,
                    setup,
                    self._runtime,
                    pieces=self._model.pieces,
                    drafter=self._drafter,
                    calibration=self._calibration,
                ),
                *around,
            ),
            budget_bytes=budget,
            tokens_per_s=self._speed(setup),
            left_out=tuple(
                Row(component=component, bytes=size, note="stored, and not loaded: text runs")
                for component, size in self._model.left_out.items()
            ),
        )

    def longest(self, limit: int) -> int:
        """The longest context that fits, 0 if none does: whole steps, or all that the model has."""
        if self.plan(limit).fits:
            return limit
        low, high = 0, limit // STEP
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.plan(middle * STEP).fits else (low, middle - 1)
        return low * STEP

    def most_sequences(self, context: int) -> int:
        """The most sequences of a context that fit, at least one."""
        low, high = 1, MOST_SEQUENCES
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.plan(context, middle).fits
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _speed(self, setup: Setup) -> tuple[float, float] | None:
        """Tokens per second with an empty cache, and behind a full one."""
        bandwidth = self._machine.bandwidth or self._calibration.bandwidth
        if bandwidth is None:
            return None
        empty, full = (
            bytes_per_token(self._model.spec, self._runtime, setup, depth)
            for depth in (0, setup.context)
        )
        rate = REACHED * bandwidth
        return rate / empty, rate / full


def _stored_in(drafter: Companion | None, recipe: str | None) -> Companion | None:
    """A drafter that is not quantized yet is stored as the recipe says."""
    if drafter is None or recipe is None:
        return drafter
    if any(not scheme.is_float for scheme in drafter.schemes.values()):
        return drafter
    return replace(drafter, schemes=schemes_of(drafter.spec, recipe))


def schemes_of(spec: ModelSpec, recipe: str) -> dict[str, Scheme]:
    """How a recipe stores every tensor of a model."""
    chosen = recipe_of(recipe)
    return {tensor.name: chosen.scheme_for(tensor.name, tensor.shape) for tensor in spec.tensors()}


def _does_not_fit(makers: Sequence[_Maker], longest: Sequence[int], wanted: int) -> DoesNotFitError:
    """What would fit: the longest context at the budget, or the least memory for what is wanted."""
    smallest = min((maker.plan(wanted) for maker in makers), key=lambda plan: plan.total_bytes)
    recipe = "as it is stored" if smallest.setup.recipe is None else f"in {smallest.setup.recipe}"
    most = max(longest)
    need = _size(smallest.total_bytes)
    hint = f"{need} would hold it, {recipe} with a {smallest.setup.kv} cache"
    if most:
        maker = makers[longest.index(most)]
        named = "" if maker.recipe is None else f" --recipe {maker.recipe}"
        off = " --draft off" if not maker.draft else ""
        hint = f"--context {most}{named} --kv {maker.kv}{off} fits; {hint}"
    several = f"{smallest.setup.sequences} x " if smallest.setup.sequences > 1 else ""
    budget = _size(smallest.budget_bytes)
    return DoesNotFitError(f"{several}{wanted} positions do not fit into {budget}", hint=hint)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
