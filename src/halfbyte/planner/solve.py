"""From a goal to a plan: which recipe, which cache and how much context a budget allows.

Candidates are ordered by how true they are to the original. The first that reaches the context that
is wanted wins, and takes the longest context that fits; where none reaches it, the one with the
longest context does. So more budget never makes a plan worse, and more context never costs less.
What is offered is only what the runtime can run.

A card that is too small for all of that takes as many of the last layers as fit, and its host the
others (`specs/cut.py`): every one of them there is read at the host's speed, so the most that fit
are the fastest, and whatever fits whole comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from halfbyte.errors import DoesNotFitError, InvalidInputError, UnsupportedError
from halfbyte.formats.checkpoint import Pieces
from halfbyte.models.cache import DRAFT_ROWS
from halfbyte.planner.calibration import DEFAULT, EMPTY, Store
from halfbyte.planner.cost import bytes_per_token, divided, ledger
from halfbyte.planner.runtimes import Companion, Runtime, runtime_of
from halfbyte.specs import (
    KVType,
    Machine,
    ModelSpec,
    Part,
    Place,
    Plan,
    Row,
    Scheme,
    Setup,
    check_cut,
    cuts,
    divided_name,
    parted,
    parts_of,
    recipe_of,
)

if TYPE_CHECKING:
    from halfbyte.formats.lora import Adapter

# Most faithful first.
RECIPE_ORDER = ("bf16", "q8_0", "q4_0", "q4_0-pure")
USUAL_RECIPE = "q4_0"
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
    op set. `card_layers` of the last layers on the card; without it, where a card is too small,
    as many as fit, if `divides`."""

    budget_bytes: int | None = None
    context: int | None = None
    recipe: str | None = None
    kv: KVType | None = None
    sequences: int | None = 1
    spare: int = 0
    draft: int | None = None
    reference: bool = False
    card_layers: int | None = None
    divides: bool = True


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
    context beyond the model's, or layers that a card cannot have.
    """
    limit = model.spec.context
    card_layers = _card_layers(model, machine, goal)
    if goal.context is not None and goal.context > limit:
        raise InvalidInputError(
            f"a context of {goal.context} is beyond the model's {limit}",
            hint=f"give --context {limit} or less",
        )
    makers = [
        _Maker(model, machine, goal, store, recipe, kv, draft, card_layers)
        for recipe in _recipes(model, goal)
        for kv in _caches(model, goal)
        for draft in _drafts(model, goal)
    ]
    wanted = goal.context or min(limit, USUAL_CONTEXT)
    longest = [maker.longest(limit) for maker in makers]
    plans = [maker.plan(found or wanted) for maker, found in zip(makers, longest, strict=True)]
    # What was found is in whole steps; what is wanted may lie between two.
    reaching = [
        i for i, found in enumerate(longest) if found >= wanted or makers[i].plan(wanted).fits
    ]
    if not reaching and (goal.context is not None or not any(longest)):
        cut = _divided(model, machine, goal, store, wanted)
        if cut is None:
            raise _does_not_fit(makers, longest, wanted)
        return cut, [*plans, cut]
    best = reaching[0] if reaching else longest.index(max(longest))
    context = goal.context or longest[best]
    if goal.sequences is not None:
        return makers[best].plan(context), plans
    context = min(context, wanted)
    return makers[best].plan(context, makers[best].most_sequences(context)), plans


def unbounded(model: Model, machine: Machine, goal: Goal, store: Store = EMPTY) -> Plan:
    """The plan of exactly what is asked for, even where it does not fit."""
    assert goal.context is not None and goal.kv is not None and goal.draft is not None
    card_layers = _card_layers(model, machine, goal)
    maker = _Maker(model, machine, goal, store, goal.recipe, goal.kv, goal.draft, card_layers)
    return maker.plan(goal.context)


def _card_layers(model: Model, machine: Machine, goal: Goal) -> int | None:
    """How many layers were asked for on the card; None where it has all."""
    if goal.card_layers is None:
        return None
    if machine.kind != "cuda" or machine.host is None:
        raise InvalidInputError(
            "--card-layers is for a card, and there is none",
            hint="give --device cuda where there is one, or plan for --machine CARD",
        )
    check_cut(model.spec, goal.card_layers)
    return goal.card_layers if goal.card_layers in cuts(model.spec) else None


def _divided(model: Model, machine: Machine, goal: Goal, store: Store, context: int) -> Plan | None:
    """The most faithful plan of a model divided between a card and its host, with the most layers
    on the card; None where there is none. What is not quantized yet is, as small as is usual."""
    if machine.host is None or not goal.divides or goal.card_layers is not None:
        return None
    recipe = goal.recipe or (None if model.quantized else USUAL_RECIPE)
    for kv in _caches(model, goal):
        for draft in _drafts(model, goal):
            low, high, best = 0, len(numbers := cuts(model.spec)), None
            while low < high:
                middle = (low + high) // 2
                maker = _Maker(model, machine, goal, store, recipe, kv, draft, numbers[middle])
                plan = maker.plan(context)
                if plan.total_bytes > plan.budget_bytes:
                    high = middle
                else:
                    low, best = middle + 1, plan
            if best is not None and best.fits:
                return best
    return None


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
    """Plans of one recipe, one kind of cache and one way to draft, for any context; of a model on
    one device, or divided between a card and its host."""

    def __init__(
        self,
        model: Model,
        machine: Machine,
        goal: Goal,
        store: Store,
        recipe: str | None,
        kv: KVType,
        draft: int,
        card_layers: int | None,
    ) -> None:
        self._model, self._machine, self._goal = model, machine, goal
        self.recipe = recipe
        self.kv: KVType = kv
        self.draft = draft
        self._card_layers = card_layers
        self._drafter = self._able(_stored_in(model.drafter, recipe)) if draft else None
        self._schemes = model.schemes if recipe is None else schemes_of(model.spec, recipe)
        before, own = None, model.spec.whole
        if card_layers is not None:
            before, own = parts_of(model.spec, card_layers)
        self._runtime = self._runtime_of(machine, own)
        self._calibration = store.of(machine.name, self._runtime.name)
        self._front: Runtime | None = None
        self._host_calibration = DEFAULT
        if (host := self._host) is not None and before is not None:
            self._front = self._runtime_of(host, before)
            self._host_calibration = store.of(host.name, self._front.name)

    @property
    def _host(self) -> Machine | None:
        """Where the layers are that are not on the card, if any."""
        return None if self._card_layers is None else self._machine.host

    def _able(self, drafter: Companion | None) -> Companion | None:
        """The drafter, if it can work beside the layers on the card."""
        if drafter is None or self._card_layers is None:
            return drafter
        return None if parted(drafter.spec, self._model.spec, self._card_layers) else drafter

    def _runtime_of(self, machine: Machine, part: Part) -> Runtime:
        return runtime_of(
            machine.kind,
            self._model.spec,
            self._schemes,
            adapters=[*self._model.adapters.values()],
            reference=self._goal.reference and machine is self._machine,
            part=part,
        )

    def plan(self, context: int, sequences: int | None = None) -> Plan:
        """`sequences` None: as many as are asked for, or one."""
        goal, machine, host = self._goal, self._machine, self._host
        setup = Setup(
            recipe=self.recipe,
            kv=self.kv,
            context=context,
            sequences=sequences or goal.sequences or 1,
            spare=goal.spare,
            draft=self.draft,
            drafter=None if self._drafter is None else self._drafter.name,
            adapters=tuple(self._model.adapters),
            card_layers=self._card_layers,
        )
        given = goal.budget_bytes
        budget = machine.memory_bytes if given is None else given
        return Plan(
            model=self._model.name,
            machine=machine.name,
            ops=self._name,
            setup=setup,
            rows=(
                *self._ledger(setup),
                *_around(budget, machine.used_bytes if given is None else 0),
                *(() if host is None else _around(host.memory_bytes, host.used_bytes, "host")),
            ),
            budget_bytes=budget,
            host_budget_bytes=0 if host is None else host.memory_bytes,
            tokens_per_s=self._speed(setup),
            left_out=tuple(
                Row(component=component, bytes=size, note="stored, and not loaded: text runs")
                for component, size in self._model.left_out.items()
            ),
        )

    @property
    def _name(self) -> str:
        """The op set, or both, as a decoder names them."""
        front, name = self._front, self._runtime.name
        if front is None:
            return name
        return divided_name(name, front.name, len(front.part.layers))

    def _ledger(self, setup: Setup) -> tuple[Row, ...]:
        spec, pieces, front = self._model.spec, self._model.pieces, self._front
        if front is None:
            return ledger(
                spec,
                self._schemes,
                setup,
                self._runtime,
                pieces=pieces,
                drafter=self._drafter,
                calibration=self._calibration,
            )
        return divided(
            spec,
            self._schemes,
            setup,
            front,
            self._runtime,
            pieces=pieces,
            drafter=self._drafter,
            calibration=self._host_calibration,
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
        """Tokens per second with an empty cache, and behind a full one. A card and its host take
        turns."""
        parts = [(self._runtime, self._machine.bandwidth or self._calibration.bandwidth)]
        if self._front is not None and (host := self._host) is not None:
            parts.append((self._front, host.bandwidth or self._host_calibration.bandwidth))
        empty = full = 0.0
        for runtime, bandwidth in parts:
            if bandwidth is None:
                return None
            rate = REACHED * bandwidth
            empty += bytes_per_token(self._model.spec, runtime, setup, 0) / rate
            full += bytes_per_token(self._model.spec, runtime, setup, setup.context) / rate
        return 1 / empty, 1 / full


def _around(budget: int, used: int, place: Place = "device") -> Iterator[Row]:
    """What others use, and what is left free."""
    for component, size, note in (
        ("runtime.other_processes", used, "in use now"),
        ("runtime.margin", int(MARGIN * budget), f"{MARGIN:.0%} of the budget, left free"),
    ):
        yield Row(component=component, bytes=size, basis="calibrated", note=note, place=place)


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
    if smallest.setup.card_layers is not None:
        hint = f"give fewer --card-layers, or {hint}"
    several = f"{smallest.setup.sequences} x " if smallest.setup.sequences > 1 else ""
    budget = _size(smallest.budget_bytes)
    return DoesNotFitError(f"{several}{wanted} positions do not fit into {budget}", hint=hint)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
