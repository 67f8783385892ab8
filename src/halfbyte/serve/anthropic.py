"""Anthropic's Messages API, as a stateless shim: a request becomes a chat request, and back.

Here the frames must have `event:` lines, which the chat completions must not have.

Source: Anthropic's API reference (messages, streaming, tool use, extended thinking, counting).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from halfbyte.serve.answering import Object, frame
from halfbyte.serve.asking import Asker
from halfbyte.serve.conversation import text_of
from halfbyte.serve.failure import Failure, refused
from halfbyte.serve.job import Job
from halfbyte.serve.openai import call_of
from halfbyte.serve.service import Service
from halfbyte.serve.stream import Delta, Told
from halfbyte.serve.wire import (
    AnthropicMessage,
    ChatRequest,
    CountRequest,
    Message,
    MessagesRequest,
    Part,
    Thinking,
)

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def asked_by(asker: Asker) -> Callable[[MessagesRequest, str], Job]:
    """What makes jobs of messages."""

    def make(asked: MessagesRequest, client: str) -> Job:
        return asker.chat(as_chat(asked), client)

    return make


def count(service: Service, asked: CountRequest) -> Object:
    """How many tokens a request's prompt has."""
    chat = as_chat(MessagesRequest(max_tokens=1, **dict(asked)))
    tools = [] if chat.tool_choice == "none" else chat.tools or []
    return {"input_tokens": len(service.asker.prompt(chat, tools))}


def as_chat(asked: MessagesRequest) -> ChatRequest:
    """The same request in OpenAI's words."""
    system = _texts(asked.system, "system") if asked.system else ""
    messages = [Message(role="system", content=system)] if system else []
    for index, message in enumerate(asked.messages):
        messages += _messages(message, f"messages.{index}")
    choice = asked.tool_choice or {}
    named = choice.get("type") == "tool"
    return ChatRequest(
        model=asked.model,
        messages=messages,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        stop=asked.stop_sequences or None,
        stream=asked.stream,
        tools=[_tool(tool) for tool in asked.tools or () if "input_schema" in tool] or None,
        tool_choice={"function": {"name": choice.get("name")}}
        if named
        else cast(Any, CHOICES.get(str(choice.get("type")))),
        parallel_tool_calls=False if choice.get("disable_parallel_tool_use") is True else None,
        thinking=asked.thinking or Thinking(type="disabled"),
    )


def _tool(tool: Object) -> Object:
    return {
        "type": "function",
        "function": {
            "name": tool.get("name"),
            "description": tool.get("description", ""),
            "parameters": tool["input_schema"],
        },
    }


def _messages(given: AnthropicMessage, place: str) -> list[Message]:
    """A message as one or several: results of tools are messages of their own."""
    if isinstance(given.content, str):
        return [Message(role=given.role, content=given.content)]
    results: list[Message] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Object] = []
    for index, block in enumerate(given.content):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking", "thinking": str(thought)}:
                thoughts.append(thought)
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "tool_use", "id": str(name), "name": str(called), "input": dict(values)}:
                function = {"name": called, "arguments": json.dumps(values)}
                calls.append({"id": name, "type": "function", "function": function})
            case {"type": "tool_result", "tool_use_id": str(name)}:
                text = _texts(block.get("content") or "", f"{place}.content.{index}")
                results.append(Message(role="tool", tool_call_id=name, content=text))
            case _:
                kind = str(block.get("type"))[:40]
                raise refused(
                    f"this model reads text only, not a block '{kind}' of this form",
                    f"{place}.content.{index}",
                )
    if not (texts or calls or thoughts):
        return results
    said = Message(
        role=given.role,
        content="\n".join(texts),
        tool_calls=calls or None,
        reasoning_content="\n".join(thoughts) or None,
    )
    return [*results, said]


def _texts(content: object, place: str) -> str:
    """The text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    blocks = cast("list[object]", content) if isinstance(content, list) else [content]
    parts: list[Part] = []
    for block in blocks:
        found = cast(Object, block) if isinstance(block, dict) else {}
        text = found.get("text")
        kind = str(found.get("type", "nothing"))
        parts.append(Part(type=kind, text=text if isinstance(text, str) else None))
    return text_of(Message(role="user", content=parts), place)


class MessagesForm:
    """POST /v1/messages"""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._id = "msg_" + secrets.token_hex(12)
        self._block: str | None = None
        self._place = -1

    def begin(self) -> Iterable[bytes]:
        message = {**self._message([], None), "usage": self._usage(None)}
        yield _event("message_start", message=message)

    def tell(self, index: int, delta: Delta, told: Told) -> Iterable[bytes]:
        if delta.call is not None:
            call = call_of(delta.call)
            block = {"id": _call_id(call), "name": delta.call.name, "input": {}}
            yield from self._open("tool_use", block)
            text = call["function"]["arguments"]
            yield self._delta("input_json_delta", partial_json=text)
            yield from self._shut()
        elif delta.thought:
            if self._block != "thinking":
                yield from self._open("thinking", {"thinking": "", "signature": ""})
            yield self._delta("thinking_delta", thinking=delta.thought)
        elif delta.text:
            if self._block != "text":
                yield from self._open("text", {"text": ""})
            yield self._delta("text_delta", text=delta.text)

    def end(self, index: int, told: Told) -> Iterable[bytes]:
        yield from self._shut()

    def close(self, told: list[Told]) -> Iterable[bytes]:
        reason = {"stop_reason": _reason(told[0]), "stop_sequence": told[0].stop}
        yield _event("message_delta", delta=reason, usage=self._usage(told[0]))
        yield _event("message_stop")

    def fail(self, failure: Failure) -> Iterable[bytes]:
        yield frame(failure.anthropic(), "error")

    def whole(self, told: list[Told]) -> Object:
        (answer,) = told
        blocks: list[Object] = []
        if answer.thought:
            blocks.append({"type": "thinking", "thinking": answer.thought, "signature": ""})
        if answer.text:
            blocks.append({"type": "text", "text": answer.text})
        for call in answer.calls:
            block = {"id": _call_id(call_of(call)), "name": call.name, "input": call.arguments}
            blocks.append({"type": "tool_use", **block})
        return {**self._message(blocks, answer), "usage": self._usage(answer)}

    def _message(self, blocks: Sequence[Object], told: Told | None) -> Object:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._job.model,
            "content": [*blocks],
            "stop_reason": None if told is None else _reason(told),
            "stop_sequence": None if told is None else told.stop,
        }

    def _usage(self, told: Told | None) -> Object:
        done = None if told is None else told.completion
        cached = 0 if done is None else done.cached_tokens
        return {
            "input_tokens": self._job.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": 0 if told is None else told.tokens,
        }

    def _open(self, kind: str, block: Object) -> Iterable[bytes]:
        yield from self._shut()
        self._block = kind
        self._place += 1
        yield _event(
            "content_block_start", index=self._place, content_block={"type": kind, **block}
        )

    def _delta(self, kind: str, **what: str) -> bytes:
        return _event("content_block_delta", index=self._place, delta={"type": kind, **what})

    def _shut(self) -> Iterable[bytes]:
        if self._block == "thinking":
            yield self._delta("signature_delta", signature="")
        if self._block is not None:
            yield _event("content_block_stop", index=self._place)
        self._block = None


def _event(kind: str, **fields: Any) -> bytes:
    return frame({"type": kind, **fields}, kind)


def _reason(told: Told) -> str | None:
    if told.stop is not None:
        return "stop_sequence"
    return None if told.reason is None else REASONS[told.reason]


def _call_id(call: Object) -> str:
    return str(call["id"]).replace("call_", "toolu_")
