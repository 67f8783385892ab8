"""From what a client sent to what the engine is asked for. Pure: no sockets, no engine.

Fields in which clients differ meet here; the widest of them have files of their own
(`conversation`, `offers`, `schemas`, `thinking`, `prompts`). The requests are made by
`LLM.request`, as those of `halfbyte run` are, so that the same seed says the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import SystemRandom
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.llm import LLM
from halfbyte.serve.conversation import message_of
from halfbyte.serve.failure import Failure, failure_of, refused, too_long
from halfbyte.serve.job import Job
from halfbyte.serve.offers import demanded, offered
from halfbyte.serve.prompts import ids_of, prompts_of
from halfbyte.serve.schemas import schema_of
from halfbyte.serve.stream import Telling
from halfbyte.serve.thinking import thinks, thought_budget
from halfbyte.serve.wire import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    Generating,
    Message,
    Object,
    Sampled,
)
from halfbyte.specs import Request, SamplingParams
from halfbyte.text.structure import Structure

COMPLETION_TOKENS = 16  # what OpenAI's text completions stop at where nothing is said
TOKEN_ID = re.compile("[0-9]{1,9}")
KNOBS = ("temperature", "top_p", "top_k", "min_p")


class Asker:
    """Makes jobs for one model, which is called `name`. `strict`: other names are refused."""

    def __init__(self, llm: LLM, name: str, *, strict: bool = False) -> None:
        self.llm = llm
        self.name = name
        self._strict = strict

    def chat(self, asked: ChatRequest, client: str = "") -> Job:
        """A conversation. Raises `Failure`."""
        model, adapter = self.which(asked)
        if asked.audio is not None or "audio" in (asked.modalities or ()):
            raise refused("this model answers in text only, not in audio", "modalities")
        tools = offered(asked)
        prompt = self.prompt(asked, tools)
        limit = asked.max_completion_tokens or asked.max_tokens
        self._require_room(prompt, limit)
        sampling, budget = self._sampling(asked), thought_budget(asked)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        fan: list[Request] = []
        for index in range(asked.n or 1):
            request = self._request(
                prompt,
                asked,
                client=client,
                sampling=sampling,
                max_tokens=limit,
                adapter=adapter,
                guided=asked.loop_breaker is not False,
                structure=self._structure(asked, tools),  # a guide has a state of its own
                thought_budget=budget,
                may_think=thinks(asked) is not False,
            )
            fan.append(replace(request, sequence=index, top_logprobs=top))
        stops, single = _stops(asked.stop), asked.parallel_tool_calls is False

        def tell() -> list[Telling]:
            return [
                Telling(
                    self.llm.turns.stream(prompt, tools=bool(tools)),
                    self.llm.tokenizer,
                    stops=stops,
                    single_call=single,
                )
                for _ in fan
            ]

        return self._job(asked, fan, tell, model, logprobs=bool(asked.logprobs))

    def completion(self, asked: CompletionRequest, client: str = "") -> Job:
        """Texts to be continued. Raises `Failure`."""
        model, adapter = self.which(asked)
        limit = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        if not limit and not asked.echo:
            raise refused("max_tokens 0 tells nothing without echo", "max_tokens")
        words = self.llm.tokenizer
        prompts = [ids_of(words, it, asked.suffix) for it in prompts_of(asked.prompt)]
        fan: list[Request] = []
        sampling = self._sampling(asked)
        top = None if asked.logprobs in (None, False) else int(asked.logprobs)
        echoes = asked.echo is True
        for prompt in prompts:
            self._require_room(prompt, limit, param="prompt")
            request = self._request(
                prompt,
                asked,
                client=client,
                sampling=sampling,
                max_tokens=max(1, limit),
                adapter=adapter,
                guided=False,
            )
            request = replace(request, top_logprobs=top, prompt_logprobs=echoes and top is not None)
            fan += [replace(request, sequence=index) for index in range(asked.n or 1)]
        stops = _stops(asked.stop)

        def tell() -> list[Telling]:
            turns = self.llm.turns
            return [
                Telling(
                    turns.stream(it.prompt_ids, continues_text=True),
                    self.llm.tokenizer,
                    stops=stops,
                    prompt_ids=it.prompt_ids if it.prompt_logprobs else (),
                    mute=not limit,
                )
                for it in fan
            ]

        echo = [self.llm.tokenizer.decode(it.prompt_ids) for it in fan] if echoes else []
        return self._job(asked, fan, tell, model, logprobs=top is not None, echo=tuple(echo))

    def generate(self, asked: GenerateRequest, client: str = "") -> Job:
        """One question, or for a model without a chat template one text to be continued."""
        shared: Object = {
            "max_tokens": asked.max_new_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
        }
        if self.llm.assets is not None and self.llm.assets.template is None:
            return self.completion(CompletionRequest(prompt=asked.prompt, **shared), client)
        question = Message(role="user", content=asked.prompt)
        return self.chat(ChatRequest(messages=[question], **shared), client)

    def which(self, asked: Sampled) -> tuple[str, str | None]:
        """The model's name as the answer tells it, and the adapter."""
        adapters = self.llm.adapters
        name = asked.model or self.name
        adapter = asked.adapter or (name if name in adapters else None)
        if adapter is not None and adapter not in adapters:
            loaded = ", ".join(adapters) or "none"
            raise Failure(404, f"no adapter '{adapter}'; loaded: {loaded}", "model_not_found")
        if self._strict and adapter is None and name != self.name:
            known = ", ".join([self.name, *adapters])
            raise Failure(404, f"no model '{name}'; there is {known}", "model_not_found", "model")
        return adapter or self.name, adapter

    def prompt(self, asked: ChatRequest, tools: Sequence[Object]) -> list[int]:
        """The ids of a conversation."""
        messages = [message_of(it, f"messages.{index}") for index, it in enumerate(asked.messages)]
        begun = ""
        if asked.continue_final_message:
            if messages[-1]["role"] != "assistant":
                raise refused("there is no last message of the assistant to continue", "messages")
            begun = str(messages.pop()["content"])
        try:
            ids = self.llm.chat_ids(messages, think=thinks(asked), tools=tools or None)
            return [*ids, *self.llm.tokenizer.encode(begun, special=False)]
        except HalfbyteError as error:
            raise replace(failure_of(error), param="messages") from error

    def _request(
        self, prompt: Sequence[int], asked: Generating, *, client: str, **how: Any
    ) -> Request:
        try:
            request = self.llm.request(prompt, ignore_eos=bool(asked.ignore_eos), **how)
        except HalfbyteError as error:
            raise failure_of(error) from error
        return replace(request, client=client)

    def _sampling(self, asked: Generating) -> SamplingParams:
        given = {knob: getattr(asked, knob) for knob in KNOBS}
        given["top_k"] = 0 if given["top_k"] == -1 else given["top_k"]
        if given["top_p"] == 0:  # the likeliest token alone
            given |= {"top_p": None, "top_k": 1}
        given["repetition_penalty"] = asked.repetition_penalty or asked.repeat_penalty
        seed = SystemRandom().getrandbits(32) if asked.seed is None else asked.seed % 2**64
        return replace(
            self.llm.sampling(seed=seed, **given),
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            bias=self._bias(asked.logit_bias or {}),
        )

    def _bias(self, given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
        wrong = [token for token in given if not TOKEN_ID.fullmatch(token)]
        ids = {int(token): value for token, value in given.items() if token not in wrong}
        wrong += [str(token) for token in ids if token >= self.llm.spec.vocab]
        if wrong:
            raise refused(f"logit_bias has {wrong[0][:40]!r}, which is no token id", "logit_bias")
        return tuple(sorted(ids.items()))

    def _structure(self, asked: ChatRequest, tools: Sequence[Object]) -> Structure | None:
        """What the answer must look like, if that was said."""
        schema = schema_of(asked.response_format)
        forced = demanded(asked, tools)
        structures, dialect = self.llm.turns.structures, self.llm.turns.grammar.dialect
        if forced and dialect is None:
            raise refused("this model has no form for tool calls that is known here", "tool_choice")
        try:
            if forced and dialect is not None:
                several = asked.parallel_tool_calls is not False
                return structures.of_calls(forced, dialect, several=several)
            return None if schema is None else structures.of_schema(schema)
        except HalfbyteError as error:
            param = "tools" if forced else "response_format"
            raise refused(f"{error.what} ({error.hint})", param, "invalid_schema") from error

    def _require_room(
        self, prompt: Sequence[int], limit: int | None, param: str = "messages"
    ) -> None:
        if len(prompt) > self.llm.context:
            raise replace(too_long(len(prompt), self.llm.context, limit), param=param)

    def _job(
        self,
        asked: Generating,
        fan: Sequence[Request],
        tell: Callable[[], list[Telling]],
        model: str,
        *,
        logprobs: bool,
        echo: tuple[str, ...] = (),
    ) -> Job:
        options = asked.stream_options
        return Job(
            requests=tuple(fan),
            tell=tell,
            model=model,
            streams=bool(asked.stream),
            usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            details=bool(asked.timings_per_token),
            logprobs=logprobs,
            echo=echo,
        )


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())
