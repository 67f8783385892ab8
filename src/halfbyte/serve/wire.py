"""The requests of every route as types: what is known is checked, what is not is left alone.

A field that nobody knows is ignored (clients send many); one that is known and wrong is refused,
with its name. Types are strict: "true" is no truth value. The OpenAPI document is made from these.

Source: OpenAI's and Anthropic's API references, and what their clients, Dify, LiteLLM, llama.cpp
and vLLM send and accept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from math import isfinite
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from halfbyte.serve.failure import Failure, refused
from halfbyte.serve.settings import (
    MAX_CHOICES,
    MAX_DEPTH,
    MAX_MESSAGES,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
)

Form = TypeVar("Form", bound="Wire")
Object = dict[str, Any]

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Wire(BaseModel):
    """A JSON object from a client."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Part(Wire):
    """A part of a message. Text parts are read; what else there is has a name for the refusal."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(Wire):
    """A message of a conversation, in OpenAI's form."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Annotated[list[Object], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class StreamOptions(Wire):
    """What a stream says beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Thinking(Wire):
    """Anthropic's switch for thinking."""

    type: Literal["enabled", "disabled", "adaptive", "auto"] = "enabled"
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class Reasoning(Wire):
    """The switch of the Responses API."""

    effort: Effort | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    enabled: bool | None = None


class Sampled(Wire):
    """How tokens are chosen: fields of every route that generates. What is not given is as the
    model's makers want it."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    stream: bool | None = None
    adapter: str | None = Field(default=None, description="The name of a LoRA adapter.")


class Generating(Sampled):
    """Fields that chat and text completions share."""

    max_tokens: Count | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(
        default=None, description="Go on after the model has ended its answer: for measurements."
    )
    timings_per_token: bool | None = Field(
        default=None, description="With each piece: which of its tokens had been drafted."
    )
    user: str | None = None


class ChatRequest(Generating):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Object], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Object], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | Object | None = None
    response_format: Object | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: Object | None = None
    enable_thinking: bool | None = None
    thinking: Thinking | bool | None = None
    thinking_budget: Annotated[int, Field(ge=-1)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1)] | None = None
    loop_breaker: bool | None = Field(
        default=None, description="false: let the answer go in circles and think to the end."
    )
    continue_final_message: bool | None = None
    audio: Object | None = None
    modalities: list[str] | None = None


class CompletionRequest(Generating):
    """POST /v1/completions"""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="0: only the prompt is told, with echo."
    )
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | bool | None = None


class GenerateRequest(Wire):
    """POST /generate"""

    prompt: str
    max_new_tokens: Count = 512
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None


class TokenizeRequest(Wire):
    """POST /tokenize"""

    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)] | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(Wire):
    """POST /detokenize"""

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class TemplateRequest(Wire):
    """POST /apply-template"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class PlanRequest(Wire):
    """POST /api/plan"""

    context: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    kv: Literal["bf16", "q8_0", "f32"] | None = None
    parallel: Annotated[int, Field(ge=1, le=256)] | None = None


class AnthropicMessage(Wire):
    """A message in Anthropic's form."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Object]


class CountRequest(Wire):
    """POST /v1/messages/count_tokens"""

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[Object] | None = None
    tools: Annotated[list[Object], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Object | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest, Sampled):
    """POST /v1/messages"""

    max_tokens: Count
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    metadata: Object | None = None


class ResponsesRequest(Sampled):
    """POST /v1/responses"""

    input: str | Annotated[list[Object], Field(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[Object], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: Object | None = None
    seed: Seed | None = None
    user: str | None = None
    background: bool | None = None


def read(form: type[Form], body: bytes) -> Form:
    """A request from its body. Raises `Failure` (400), naming the field."""
    with refusing():
        return form.model_validate(parse(body))


@contextmanager
def refusing() -> Generator[None]:
    """What is not valid inside is refused, naming the field: also what one form makes of another,
    which may be valid in its own words and not in those."""
    try:
        yield
    except ValidationError as error:
        raise _refusal(error) from error


def parse(body: bytes) -> Object:
    """A JSON object, of bounded depth, without numbers and texts that are none."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise refused(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise refused("the body is no JSON object", code="invalid_json")
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [item for outer in level for item in _inside(outer)]
        if not level:
            return cast(Object, value)
    raise refused(f"the body is nested more than {MAX_DEPTH} deep", code="invalid_json")


def _inside(value: object) -> list[object]:
    match value:
        case dict():
            return [*cast(Object, value), *cast(Object, value).values()]
        case list():
            return cast("list[object]", value)
        case str() if not _whole(value):
            raise refused("a text has half a character (a lone surrogate)", code="invalid_json")
        case float() if not isfinite(value):
            raise refused("a number is too large", code="invalid_json")
        case _:
            return []


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(constant: str) -> Callable[[], None]:
    raise ValueError(f"{constant} is no number")


def _refusal(error: ValidationError) -> Failure:
    """The first thing wrong, as a sentence; of several types that a field may have, the nearest."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = min(found, key=lambda it: it["type"].endswith("_type"))
    # Between the names of fields are those of the types that were tried.
    tried = {"str", "int", "float", "bool", "dict", "Thinking", "literal"}
    names = [str(part) for part in first["loc"]]
    place = ".".join(it for it in names if it.isidentifier() or it.isdigit() if it not in tried)
    return refused(f"{place or 'the body'}: {first['msg']}", place or None)
