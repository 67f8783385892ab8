"""A model to talk to: read, load, and answer. The Python face of halfbyte.

    from halfbyte import LLM

    llm = LLM("demo")
    print(llm.chat("Who are you?").text)
    for piece in llm.stream([{"role": "user", "content": "Who are you?"}]):
        print(piece.text, end="")
    first, second = llm.generate(["My dear Jane, I", "The sea was"], max_tokens=20)

Text lives here and above; the engine below sees ids only. One caller at a time: the server has its
own thread for the engine, and makes its requests here too, so that both say the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypedDict, Unpack

from halfbyte.engine import Drafting, LookupDrafter, ModelDrafter
from halfbyte.engine.engine import Engine
from halfbyte.engine.sequence import Completion
from halfbyte.errors import DoesNotFitError, InvalidInputError, UnsupportedError
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.lora import open_adapter
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.kernels.choice import choose, choose_front, declined, usable
from halfbyte.kernels.contract import OpSet
from halfbyte.models.load import load, load_drafter
from halfbyte.planner.calibration import read_store
from halfbyte.planner.monitor import sample
from halfbyte.planner.opening import (
    companion_of,
    opened,
    options_of,
    refuse_another,
    usual_plan,
)
from halfbyte.planner.probe import resident_bytes, this_machine
from halfbyte.planner.running import announce
from halfbyte.planner.solve import USUAL_CONTEXT, Goal, solve, unbounded
from halfbyte.quantizer.opening import open_drafter, open_source
from halfbyte.specs import (
    AUTO,
    DeviceKind,
    LoadOptions,
    Machine,
    ModelSpec,
    Plan,
    Request,
    SamplingParams,
    most_drafts,
    parted,
)
from halfbyte.text.answer import Answer, AnswerStream, Piece, collected
from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.structure import Structure
from halfbyte.text.tokenizer import Tokenizer

# For a model whose makers say nothing about sampling.
FALLBACK = {"temperature": 0.8, "top_p": 0.95}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes: of packed weights, of adapters, of the drafter, of the cache, what the plan counts in
    all, the most this process grew to, and what it holds on cards now."""

    weights_bytes: int
    adapters_bytes: int
    drafter_bytes: int
    kv_bytes: int
    planned_bytes: int
    peak_bytes: int
    card_bytes: int = 0


Messages = str | Sequence[Mapping[str, Any]]


class How(TypedDict, total=False):
    """How to answer a conversation: see `LLM.reply` and `LLM.chat_ids`."""

    think: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    sampling: SamplingParams | None
    max_tokens: int | None
    adapter: str | None


class LLM:
    """A loaded model. `model` is whatever the command line takes as MODEL; `adapters` are LoRA
    adapters by name, each the path of a PEFT directory, maybe with `@SCALE`; `template` is a chat
    template in place of the model's own. With a `plan` the model is loaded as it says, or refused.
    `notes` are what a person should know of the loading."""

    def __init__(
        self,
        model: str,
        options: LoadOptions | None = None,
        *,
        adapters: Mapping[str, str] | None = None,
        template: str | None = None,
        plan: Plan | None = None,
        progress: Progress | None = None,
    ) -> None:
        options = options or LoadOptions()
        if plan is not None:
            options = options_of(plan, options)
        self._resident_before = resident_bytes()
        self._place = locate(model, progress)
        source = open_source(
            str(self._place), recipe=options.recipe, method=options.method, progress=progress
        )
        self.notes: list[str] = []
        self.spec: ModelSpec = source.spec
        self.assets: TextAssets | None = source.assets
        if self.assets is not None and template is not None:
            self.assets = replace(self.assets, template=template)
        self.adapters = {
            name: open_adapter(text, self.spec) for name, text in (adapters or {}).items()
        }
        ops = choose(self.spec, options.device, options.dtype, threads=options.threads)
        reason = declined(self.spec, options.device)
        if reason is not None:
            self.notes.append(f"the reference op set runs, slowly: {reason}")
        self.kind: DeviceKind = "cuda" if usable(options.device).startswith("cuda") else "cpu"
        drafts = options.draft != "off" and (plan is None or plan.setup.drafter is not None)
        drafter = self._drafter(source, options, progress) if drafts else None
        self.plan = self._planned(model, source, ops, options, drafter, plan)
        setup = self.plan.setup
        if setup.drafter is None and drafter is not None:
            self._leave_aside(drafter, options)
            drafter = None
        self.context = setup.context
        front = choose_front(
            self.spec, options.device, setup.card_layers, options.dtype, threads=options.threads
        )
        self.decoder = load(source, ops, front=front, adapters=self.adapters, progress=progress)
        body_bytes = ops.packed_bytes
        drafting = self._drafting(drafter, options, progress)
        self._drafter_bytes = ops.packed_bytes - body_bytes
        self.engine = Engine(
            self.decoder,
            context=self.context,
            max_sequences=setup.sequences,
            prefill_chunk=setup.prefill_chunk,
            kv=setup.kv,
            spare=setup.spare,
            keeps=True,
            drafting=drafting,
        )
        announce(
            self,
            model,
            planned_bytes=self.plan.own_bytes,
            before_bytes=self._resident_before,
        )

    def _planned(
        self,
        model: str,
        source: Source,
        ops: OpSet,
        options: LoadOptions,
        drafter: Source | None,
        given: Plan | None,
    ) -> Plan:
        goal = Goal(
            budget_bytes=None if given is None else given.budget_bytes,
            context=options.context,
            kv=options.kv,
            sequences=options.parallel,
            spare=options.spare,
            draft=most_drafts(options.draft),
            reference=ops.name == "reference",
            card_layers=options.card_layers,
            divides=given is None,
        )
        companion = None if drafter is None else companion_of(options.drafter, drafter)
        self._described = opened(model, source, companion, self.adapters)
        machine = this_machine(self.kind)
        plan = usual_plan(self._described, machine, goal, read_store())
        if given is not None:
            refuse_another(given, plan)
        if plan.setup.context < min(self.spec.context, options.context or USUAL_CONTEXT):
            self.notes.append(f"memory allows a context of {plan.setup.context}")
        if plan.setup.card_layers is not None and options.card_layers is None:
            self._tell_of_the_cut(plan, machine, goal)
        return plan

    def _tell_of_the_cut(self, plan: Plan, machine: Machine, goal: Goal) -> None:
        """Notes that the card has not all layers, and whether a smaller cache would change that."""
        every, smaller = len(self.spec.layers), ""
        try:
            solve(self._described, machine, replace(goal, kv="q8_0", divides=False))
            smaller = "; with --kv q8_0 it has room for all"
        except (DoesNotFitError, UnsupportedError):
            pass
        layers = plan.setup.card_layers
        told = f"for {layers} of {every} layers, the others run on the CPU"
        if layers == every:
            told = "for all layers and not for the embeddings, which are looked up on the CPU"
        self.notes.append(f"the card has room {told}{smaller}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self._assets())

    @cached_property
    def turns(self) -> Chat:
        """How conversations become ids, and answers text."""
        return Chat(self.tokenizer, self._assets())

    @property
    def memory(self) -> Memory:
        adapters_bytes, drafter_bytes = self.decoder.adapter_bytes, self._drafter_bytes
        now = sample()
        return Memory(
            weights_bytes=self.decoder.packed_bytes - adapters_bytes - drafter_bytes,
            adapters_bytes=adapters_bytes,
            drafter_bytes=drafter_bytes,
            kv_bytes=self.engine.cache_bytes,
            planned_bytes=self.plan.own_bytes,
            peak_bytes=max(0, now.peak_bytes - self._resident_before),
            card_bytes=now.card_bytes or 0,
        )

    @property
    def before_bytes(self) -> int:
        """What the process had before the model was loaded: its libraries."""
        return self._resident_before

    @property
    def stored(self) -> dict[str, int]:
        """How many tensors are stored in each scheme."""
        return dict(Counter(scheme.name for scheme in self._described.schemes.values()))

    def planned(self, machine: Machine, goal: Goal) -> Plan:
        """What running this model in another way would take, whether or not it fits."""
        return unbounded(self._described, machine, goal, read_store())

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        think: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The prompt of a conversation, up to where the model's answer begins."""
        return self.turns.render(messages, think=think, tools=tools)

    def raw_ids(self, text: str) -> list[int]:
        """The prompt that continues a text: one BOS, if the model uses one, and the text."""
        return self.tokenizer.encode_raw(text)

    def sampling(self, *, seed: int = 0, **given: float | None) -> SamplingParams:
        """The model's own sampling defaults, with what is given (not None) put over them."""
        defaults = self._assets().generation
        knobs = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        own = {name: getattr(defaults, name) for name in knobs}
        if all(value is None for value in own.values()):
            own |= FALLBACK
        chosen = {**own, **{name: value for name, value in given.items() if value is not None}}
        known = {name: value for name, value in chosen.items() if value is not None}
        parameters = SamplingParams(seed=seed, suppress=frozenset(defaults.suppress_ids))
        return replace(parameters, **known)

    def chat(self, messages: Messages, **how: Unpack[How]) -> Answer:
        """The answer to a conversation, or to one question."""
        reply = self._asked(messages, how)
        reply.finish()
        return reply.answer

    def stream(self, messages: Messages, **how: Unpack[How]) -> Iterator[Piece]:
        """The answer to a conversation, or to one question, as it comes."""
        return iter(self._asked(messages, how))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        adapter: str | None = None,
    ) -> list[str]:
        """How texts go on: as many at once as the model was loaded for (`parallel`)."""
        ids = [self.raw_ids(prompt) for prompt in prompts]
        requests = [
            self.request(
                it, sampling=sampling, max_tokens=max_tokens, adapter=adapter, guided=False
            )
            for it in ids
        ]
        return [
            self._continuation(prompt, done.token_ids)
            for prompt, done in zip(ids, self.engine.generate(requests), strict=True)
        ]

    def request(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        ignore_eos: bool = False,
        adapter: str | None = None,
        guided: bool = True,
        structure: Structure | None = None,
        thought_budget: int | None = None,
        may_think: bool = True,
    ) -> Request:
        """What the engine is asked for. `guided`: circles are broken, and a thought leaves room for
        an answer; with a `structure` or a budget (ids that a thought may take), those hold too."""
        room = max(1, self.context + 1 - len(prompt_ids))
        free = ignore_eos or not (guided or structure or thought_budget is not None)
        guide = None
        if not free:
            guide = self.turns.guide(
                prompt_ids,
                room=min(room, max_tokens or room),
                thought_budget=thought_budget,
                breaks_circles=guided,
                structure=structure,
                may_think=may_think,
            )
        return Request(
            prompt_ids=tuple(prompt_ids),
            sampling=sampling or self.sampling(),
            max_tokens=max_tokens,
            stop_ids=frozenset() if ignore_eos else self.turns.stop_ids,
            adapter=adapter,
            guide=guide,
        )

    def reply(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        ignore_eos: bool = False,
        continues_text: bool = False,
        tools: bool = False,
        adapter: str | None = None,
    ) -> Reply:
        """What the model says next. `continues_text`: the prompt is text, not a conversation;
        `tools`: it offers some; `adapter`: the name of one that was loaded."""
        request = self.request(
            prompt_ids,
            sampling=sampling,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            adapter=adapter,
            guided=not continues_text,
        )
        stream = self.turns.stream(prompt_ids, continues_text=continues_text, tools=tools)
        return Reply(self.engine, request, stream)

    def _asked(self, messages: Messages, how: How) -> Reply:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        tools = how.get("tools")
        return self.reply(
            self.chat_ids(messages, think=how.get("think"), tools=tools),
            sampling=how.get("sampling"),
            max_tokens=how.get("max_tokens"),
            tools=bool(tools),
            adapter=how.get("adapter"),
        )

    def _continuation(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        stream = self.turns.stream(prompt_ids, continues_text=True)
        pieces = [piece for token in token_ids for piece in stream.push(token)]
        return collected([*pieces, *stream.finish()]).text

    def _drafting(
        self, drafter: Source | None, options: LoadOptions, progress: Progress | None
    ) -> Drafting | None:
        """By what the text said before, and by a drafter."""
        if options.draft == "off":
            return None
        model = None if drafter is None else load_drafter(drafter, self.decoder, progress=progress)
        return Drafting(
            drafters=(LookupDrafter(), *([] if model is None else [ModelDrafter(model)])),
            length=None if options.draft == AUTO else options.draft,
        )

    def _drafter(
        self, source: Source, options: LoadOptions, progress: Progress | None
    ) -> Source | None:
        """The drafter asked for. One only found beside the model may turn out to be another's."""
        try:
            return open_drafter(
                options.drafter,
                source,
                self._place,
                recipe=options.recipe,
                method=options.method,
                progress=progress,
            )
        except InvalidInputError as error:
            if options.drafter != AUTO:
                raise
            self.notes.append(f"the drafter beside the model is left aside: {error.what}")
            return None

    def _leave_aside(self, drafter: Source, options: LoadOptions) -> None:
        """Notes why a drafter is not used; refuses one asked for by name that cannot work."""
        layers = self.plan.setup.card_layers
        reason = None if layers is None else parted(drafter.spec, self.spec, layers)
        if reason is not None and options.drafter != AUTO:
            raise InvalidInputError(
                f"with {layers} layers on the card the drafter cannot work: {reason}",
                hint="give more --card-layers, or --draft off",
            )
        reason = reason or "memory has no room for it"
        self.notes.append(f"the drafter is left aside: {reason}")

    def _assets(self) -> TextAssets:
        if self.assets is None:
            raise UnsupportedError(
                "the model has no tokenizer", hint="put its tokenizer.json beside the weights"
            )
        return self.assets


class Reply:
    """An answer under way. Iterate over its pieces; then `completion` says how it ended.

    Leaving the iteration early (Ctrl-C too) stops the answer; the model stays usable.
    """

    def __init__(self, engine: Engine, request: Request, stream: AnswerStream) -> None:
        self._engine, self._request, self._stream = engine, request, stream
        self._pieces: list[Piece] = []
        self.completion: Completion | None = None

    def __iter__(self) -> Iterator[Piece]:
        for event in self._engine.stream(self._request):
            if event.token_id is not None:
                yield from self._keep(self._stream.push(event.token_id))
            self.completion = event.completion
        yield from self._keep(self._stream.finish())

    def finish(self) -> Completion:
        """Runs to the end."""
        for _ in self:
            pass
        assert self.completion is not None
        return self.completion

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that answers."""
        return self._request.adapter

    @property
    def answer(self) -> Answer:
        """What was said, thought and called so far."""
        return collected(self._pieces)

    def _keep(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self._pieces.append(piece)
            yield piece
