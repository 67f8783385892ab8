"""A model to talk to: read, load, and answer. The Python face of halfbyte.

    from halfbyte import LLM

    llm = LLM("demo")
    for piece in llm.reply(llm.chat_ids([{"role": "user", "content": "Who are you?"}])):
        print(piece.text, end="")

Text lives here and above; the engine below sees ids only. One reply at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from halfbyte.engine import Drafting, LookupDrafter, ModelDrafter
from halfbyte.engine.engine import Engine
from halfbyte.engine.sequence import Completion
from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.lora import open_adapter
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.kernels.choice import choose, usable
from halfbyte.kernels.contract import OpSet
from halfbyte.kernels.cpu import CPUOps
from halfbyte.models.load import load, load_drafter
from halfbyte.planner.calibration import read_store
from halfbyte.planner.monitor import sample
from halfbyte.planner.opening import companion_of, options_of, plan_of_source, refuse_another
from halfbyte.planner.probe import resident_bytes, this_machine
from halfbyte.planner.running import announce
from halfbyte.planner.solve import USUAL_CONTEXT, Goal
from halfbyte.quantizer.opening import open_drafter, open_source
from halfbyte.specs import AUTO, LoadOptions, ModelSpec, Plan, Request, SamplingParams
from halfbyte.text.answer import Answer, AnswerStream, Piece, collected
from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
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
        drafts = options.draft != "off" and (plan is None or plan.setup.drafter is not None)
        drafter = self._drafter(source, options, progress) if drafts else None
        self.plan = self._planned(model, source, ops, options, drafter, plan)
        setup = self.plan.setup
        if setup.drafter is None and drafter is not None:
            self.notes.append("the drafter is left aside: memory has no room for it")
            drafter = None
        self.context = setup.context
        self.decoder = load(source, ops, adapters=self.adapters, progress=progress)
        body_bytes = ops.packed_bytes
        drafting = self._drafting(drafter, options, progress)
        self._drafter_bytes = ops.packed_bytes - body_bytes
        self.engine = Engine(
            self.decoder,
            context=self.context,
            max_sequences=setup.sequences,
            prefill_chunk=setup.prefill_chunk,
            kv=setup.kv,
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
        kind = "cuda" if usable(options.device).startswith("cuda") else "cpu"
        goal = Goal(
            budget_bytes=None if given is None else given.budget_bytes,
            context=options.context,
            kv=options.kv,
            sequences=1 if given is None else given.setup.sequences,
            draft={"off": 0, AUTO: None}.get(str(options.draft), options.draft),  # type: ignore[arg-type]
            reference=not isinstance(ops, CPUOps),
        )
        plan = plan_of_source(
            model,
            source,
            this_machine(kind),
            goal,
            drafter=None if drafter is None else companion_of(options.drafter, drafter),
            adapters=self.adapters,
            store=read_store(),
        )
        if given is not None:
            refuse_another(given, plan)
        if plan.setup.context < min(self.spec.context, options.context or USUAL_CONTEXT):
            self.notes.append(f"memory allows a context of {plan.setup.context}")
        return plan

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self._assets())

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.tokenizer, self._assets())

    @property
    def memory(self) -> Memory:
        adapters_bytes, drafter_bytes = self.decoder.adapter_bytes, self._drafter_bytes
        now = sample()
        return Memory(
            weights_bytes=self.decoder.ops.packed_bytes - adapters_bytes - drafter_bytes,
            adapters_bytes=adapters_bytes,
            drafter_bytes=drafter_bytes,
            kv_bytes=self.engine.cache_bytes,
            planned_bytes=self.plan.own_bytes,
            peak_bytes=max(0, now.peak_bytes - self._resident_before),
            card_bytes=now.card_bytes or 0,
        )

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        think: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The prompt of a conversation, up to where the model's answer begins."""
        return self.chat.render(messages, think=think, tools=tools)

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
        request = Request(
            prompt_ids=tuple(prompt_ids),
            sampling=sampling or self.sampling(),
            max_tokens=max_tokens,
            stop_ids=frozenset() if ignore_eos else self.chat.stop_ids,
            adapter=adapter,
        )
        stream = self.chat.stream(prompt_ids, continues_text=continues_text, tools=tools)
        return Reply(self.engine, request, stream)

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
