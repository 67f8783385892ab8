"""From what a client sent to what the engine is asked for. Pure: no sockets, no engine.

Fields in which clients differ meet here: four spellings of a JSON schema, nine switches for
thinking, two names of most penalties. The requests are made by `LLM.request`, as those of
`halfbyte run` are, so that the same seed says the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import SystemRandom
from typing import Any, cast

from halfbyte.errors import HalfbyteError
from halfbyte.llm import LLM
from halfbyte.serve.failure import Failure, failure_of, refused, too_long
from halfbyte.serve.settings import MAX_PROMPTS
from halfbyte.serve.stream import Telling
from halfbyte.serve.wire import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    Generating,
    Message,
    Object,
    Sampled,
    Thinking,
)
from halfbyte.specs import Request, SamplingParams
from halfbyte.text.structure import ANY_OBJECT, Structure

COMPLETION_TOKENS = 16  # what OpenAI's text completions stop at where nothing is said
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
KNOBS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request as the engine's: a request and a telling for every choice.

    `usage`: the client wants counts in a stream; `details`: it wants to know what was drafted.
    `names`: what the answer calls the model. `echo`: the prompts, if they are to be told again.
    """

    requests: tuple[Request, ...]
    tell: Callable[[], list[Telling]]
    model: str
    streams: bool = False
    usage: bool = False
    continuous_usage: bool = False
    details: bool = False
    logprobs: bool = False
    echo: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; several answers to one prompt count it once."""
        return sum(len(it.prompt_ids) for it in self.requests if it.sequence == 0)


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
        tools = _tools(asked)
        prompt = self.prompt(asked, tools)
        limit = asked.max_completion_tokens or asked.max_tokens
        self._require_room(prompt, limit)
        sampling, budget = self._sampling(asked), _budget(asked)
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
                may_think=thinking(asked) is not False,
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
        limit = asked.max_tokens or COMPLETION_TOKENS
        prompts = [self._text_ids(text, asked.suffix) for text in _prompts(asked.prompt)]
        fan: list[Request] = []
        sampling = self._sampling(asked)
        top = None if asked.logprobs in (None, False) else int(asked.logprobs)
        for prompt in prompts:
            self._require_room(prompt, limit, param="prompt")
            request = self._request(
                prompt,
                asked,
                client=client,
                sampling=sampling,
                max_tokens=limit,
                adapter=adapter,
                guided=False,
            )
            fan += [
                replace(request, sequence=index, top_logprobs=top) for index in range(asked.n or 1)
            ]
        stops = _stops(asked.stop)

        def tell() -> list[Telling]:
            turns = self.llm.turns
            return [
                Telling(
                    turns.stream(it.prompt_ids, continues_text=True),
                    self.llm.tokenizer,
                    stops=stops,
                )
                for it in fan
            ]

        echo = [self.llm.tokenizer.decode(it.prompt_ids) for it in fan] if asked.echo else []
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
        messages = [_message(index, it) for index, it in enumerate(asked.messages)]
        begun = ""
        if asked.continue_final_message:
            if messages[-1]["role"] != "assistant":
                raise refused("there is no last message of the assistant to continue", "messages")
            begun = str(messages.pop()["content"])
        try:
            ids = self.llm.chat_ids(messages, think=thinking(asked), tools=tools or None)
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
        wrong = [token for token in given if not token.isascii() or not token.isdigit()]
        ids = {int(token): value for token, value in given.items() if token not in wrong}
        wrong += [str(token) for token in ids if token >= self.llm.spec.vocab]
        if wrong:
            raise refused(f"logit_bias has {wrong[0][:40]!r}, which is no token id", "logit_bias")
        return tuple(sorted(ids.items()))

    def _structure(self, asked: ChatRequest, tools: Sequence[Object]) -> Structure | None:
        """What the answer must look like, if that was said."""
        schema = schema_of(asked.response_format)
        forced = _forced(asked, tools)
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

    def _text_ids(self, text: str | list[int], suffix: str | None) -> list[int]:
        words = self.llm.tokenizer
        if isinstance(text, list):
            if suffix:
                raise refused("suffix needs a prompt of text", "suffix")
            if not text:
                raise refused("the prompt is empty", "prompt")
            return text
        try:
            if not suffix:
                ids = self.llm.raw_ids(text)
            else:
                ids = _around(
                    words.token_id, lambda it: words.encode(it, special=False), text, suffix
                )
                ids = words.with_bos(ids)
        except HalfbyteError as error:
            raise replace(failure_of(error), param="prompt") from error
        if not ids:
            raise refused(
                "the prompt is empty, and this model's texts begin with no token", "prompt"
            )
        return ids

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


def thinking(asked: ChatRequest) -> bool | None:
    """On, off, or as the template has it. Of several switches one that says off wins."""
    kwargs = asked.chat_template_kwargs or {}
    efforts = [asked.reasoning_effort, asked.reasoning and asked.reasoning.effort]
    said: list[object] = [
        asked.enable_thinking,
        kwargs.get("enable_thinking"),
        kwargs.get("thinking"),
        asked.reasoning and asked.reasoning.enabled,
        *(None if effort is None else effort != "none" for effort in efforts),
        None if _budget(asked) is None else _budget(asked) != 0,
    ]
    switch = asked.thinking
    if isinstance(switch, Thinking):
        kinds = {"enabled": True, "disabled": False}
        said.append(kinds.get(switch.type))
    else:
        said.append(switch)
    known = [it for it in said if isinstance(it, bool)]
    return all(known) if known else None


def schema_of(given: Object | None) -> Mapping[str, Any] | None:
    """The JSON schema of a response_format, in any of its spellings; None for text."""
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object", "schema": dict() as schema}:
            return cast(Object, schema)
        case {"type": "json_object"}:
            return ANY_OBJECT
        case {"type": "json_schema"}:
            return _schema_inside(given.get("json_schema", given.get("schema")))
        case _:
            raise refused(
                "response_format.type is text, json_object or json_schema", "response_format"
            )


def _schema_inside(given: object) -> Mapping[str, Any]:
    """The schema in OpenAI's wrapping, or bare, or either as a string of JSON."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise refused(
                f"the schema is not JSON: {error}", "response_format", "invalid_schema"
            ) from error
    match given:
        case {"schema": dict() as schema}:
            return cast(Object, schema)
        case dict():
            return cast(Object, given)
        case _:
            raise refused("response_format has no schema", "response_format", "invalid_schema")


def _tools(asked: ChatRequest) -> list[Object]:
    """The tools that are offered, in OpenAI's form; none where they may not be called."""
    given = asked.tools or [{"type": "function", "function": it} for it in asked.functions or ()]
    if (asked.tool_choice or asked.function_call) == "none":
        return []
    tools: list[Object] = []
    for index, tool in enumerate(given):
        function = tool.get("function", tool)
        name = cast(Object, function).get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise refused(f"tools.{index} has no function with a name", f"tools.{index}")
        whole = {"description": "", "parameters": NO_PARAMETERS, **cast(Object, function)}
        tools.append({"type": "function", "function": whole})
    return tools


def _forced(asked: ChatRequest, tools: Sequence[Object]) -> list[Object]:
    """The functions of which one must be called; none where that is not said."""
    choice = asked.tool_choice or asked.function_call
    functions: list[Object] = [tool["function"] for tool in tools]
    if choice == "required":
        return functions
    if not isinstance(choice, dict):
        return []
    named = choice.get("function", choice)
    name = cast(Object, named).get("name") if isinstance(named, dict) else None
    found = [function for function in functions if function["name"] == name]
    if not found:
        raise refused(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
    return found


def _budget(asked: ChatRequest) -> int | None:
    switch = asked.thinking if isinstance(asked.thinking, Thinking) else None
    budgets = [
        asked.thinking_budget,
        asked.thinking_token_budget,
        switch and switch.budget_tokens,
        asked.reasoning and asked.reasoning.max_tokens,
    ]
    return next((it for it in budgets if it is not None and it >= 0), None)


def _message(index: int, given: Message) -> Object:
    """A message as templates read it."""
    place = f"messages.{index}"
    roles = {"developer": "system", "function": "tool"}
    message: Object = {
        "role": roles.get(given.role, given.role),
        "content": text_of(given, place),
    }
    thought = given.reasoning_content or given.reasoning
    for key, value in (
        ("name", given.name),
        ("tool_calls", given.tool_calls),
        ("tool_call_id", given.tool_call_id),
        ("reasoning_content", thought),
    ):
        if value:
            message[key] = value
    return message


def text_of(given: Message, place: str) -> str:
    """The text of a message's content."""
    if isinstance(given.content, str) or given.content is None:
        return given.content or ""
    texts: list[str] = []
    for index, part in enumerate(given.content):
        if part.type not in ("text", "input_text", "output_text", "refusal"):
            raise refused(
                f"this model reads text only, not '{part.type[:40]}'", f"{place}.content.{index}"
            )
        texts.append(part.text or part.refusal or "")
    return "\n".join(texts)


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _prompts(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, each text or ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise refused("the prompt is empty", "prompt")
    if isinstance(given[0], int):
        return [cast("list[int]", given)]
    if len(given) > MAX_PROMPTS:
        raise refused(f"{len(given)} prompts; at most {MAX_PROMPTS} at once", "prompt")
    return cast("list[str | list[int]]", given)


# Marks of the vocabularies that were trained to fill in the middle.
_MIDDLES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
)


def _around(
    token_id: Callable[[str], int | None],
    encode: Callable[[str], list[int]],
    before: str,
    after: str,
) -> list[int]:
    """The prompt that asks for what stands between two texts."""
    for marks in _MIDDLES:
        found = [token_id(mark) for mark in marks]
        if None not in found:
            first, second, third = (cast(int, it) for it in found)
            return [first, *encode(before), second, *encode(after), third]
    raise refused("this model was not made to fill in the middle: it cannot use suffix", "suffix")
