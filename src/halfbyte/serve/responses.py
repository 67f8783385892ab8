"""OpenAI's Responses API, as a stateless shim: nothing is stored, the history comes each time.

Source: OpenAI's API reference (responses, streaming events); what Codex sends.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable
from time import time
from typing import Any, cast

from halfbyte.serve.answering import Object, frame
from halfbyte.serve.asking import Asker
from halfbyte.serve.conversation import text_of
from halfbyte.serve.failure import Failure, refused
from halfbyte.serve.job import Job
from halfbyte.serve.openai import call_of, usage
from halfbyte.serve.stream import Delta, Told
from halfbyte.serve.wire import ChatRequest, Message, Part, Reasoning, ResponsesRequest

ROLES = ("system", "developer", "user", "assistant")


def asked_by(asker: Asker) -> Callable[[ResponsesRequest, str], Job]:
    """What makes jobs of responses."""

    def make(asked: ResponsesRequest, client: str) -> Job:
        return asker.chat(as_chat(asked), client)

    return make


def as_chat(asked: ResponsesRequest) -> ChatRequest:
    """The same request in the words of chat completions. Raises `Failure`."""
    if asked.previous_response_id is not None:
        raise refused(
            "nothing is stored here: send the whole conversation as input",
            "previous_response_id",
            "unsupported_parameter",
        )
    if asked.background:
        raise refused("there are no background responses here", "background")
    tools = [_tool(tool) for tool in asked.tools or () if tool.get("type") == "function"]
    choice = asked.tool_choice if isinstance(asked.tool_choice, str) else None
    if isinstance(asked.tool_choice, dict) and "name" in asked.tool_choice:
        choice = {"function": {"name": asked.tool_choice["name"]}}
    return ChatRequest(
        model=asked.model,
        messages=_conversation(asked),
        max_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=asked.seed,
        stream=asked.stream,
        tools=tools or None,
        tool_choice=cast(Any, choice),
        parallel_tool_calls=asked.parallel_tool_calls,
        reasoning=asked.reasoning or Reasoning(),
        response_format=_format(asked.text),
        adapter=asked.adapter,
    )


def _tool(tool: Object) -> Object:
    keys = ("name", "description", "parameters")
    return {"type": "function", "function": {key: tool[key] for key in keys if key in tool}}


def _format(text: Object | None) -> Object | None:
    """The structure, which lies one level higher than in chat completions."""
    given = (text or {}).get("format")
    if not isinstance(given, dict):
        return None
    found = cast(Object, given)
    if found.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": found.get("schema")}}
    return found


def _conversation(asked: ResponsesRequest) -> list[Message]:
    messages: list[Message] = []
    if asked.instructions:
        messages.append(Message(role="system", content=asked.instructions))
    items: list[Object] = (
        [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else asked.input
    )
    thought: str | None = None
    for index, item in enumerate(items):
        place = f"input.{index}"
        match item:
            case {"type": "reasoning"}:
                thought = _texts(item.get("content") or item.get("summary") or [], place)
            case {"type": "function_call", "call_id": str(name), "name": str(called)}:
                function = {"name": called, "arguments": item.get("arguments") or "{}"}
                call: Object = {"id": name, "type": "function", "function": function}
                _add_call(messages, call, thought)
                thought = None
            case {"type": "function_call_output", "call_id": str(name)}:
                text = _texts(item.get("output") or "", place)
                messages.append(Message(role="tool", tool_call_id=name, content=text))
            case {"role": str(role), "content": content} if role in ROLES:
                text = _texts(content, place)
                messages.append(Message(role=cast(Any, role), content=text))
            case {"type": "item_reference"}:
                raise refused("nothing is stored here: send the item itself", place)
            case {"type": str()}:
                pass  # other tools' items: not ours to read
            case _:
                raise refused("an item of the input has neither a role nor a type", place)
    if not messages:
        raise refused("the input has no message", "input")
    return messages


def _add_call(messages: list[Message], call: Object, thought: str | None) -> None:
    """A call belongs to the assistant's last message, where that is the last."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant":
        last = Message(role="assistant", content="", reasoning_content=thought)
        messages.append(last)
    last.tool_calls = [*(last.tool_calls or ()), call]


def _texts(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    parts: list[Part] = []
    for block in cast("list[object]", content) if isinstance(content, list) else [content]:
        found = cast(Object, block) if isinstance(block, dict) else {}
        kind, text = str(found.get("type", "nothing")), found.get("text")
        kind = "text" if kind in ("reasoning_text", "summary_text") else kind
        parts.append(Part(type=kind, text=text if isinstance(text, str) else None))
    return text_of(Message(role="user", content=parts), place)


class ResponsesForm:
    """POST /v1/responses"""

    def __init__(self, job: Job, asked: ResponsesRequest) -> None:
        self._job = job
        self._asked = asked
        self._id = "resp_" + secrets.token_hex(12)
        self._created = int(time())
        self._number = 0
        self._items: list[Object] = []
        self._open: str | None = None

    def begin(self) -> Iterable[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", None))

    def tell(self, index: int, delta: Delta, told: Told) -> Iterable[bytes]:
        if delta.call is not None:
            yield from self._shut()
            yield from self._call(delta)
        elif delta.thought:
            if self._open != "reasoning":
                yield from self._begin("reasoning", {"summary": []}, "reasoning_text", {})
            yield self._text("response.reasoning_text.delta", delta=delta.thought)
            self._items[-1]["content"][0]["text"] += delta.thought
        elif delta.text:
            if self._open != "message":
                extra = {"annotations": [], "logprobs": []}
                yield from self._begin("message", {"role": "assistant"}, "output_text", extra)
            yield self._text("response.output_text.delta", delta=delta.text, logprobs=[])
            self._items[-1]["content"][0]["text"] += delta.text

    def end(self, index: int, told: Told) -> Iterable[bytes]:
        yield from self._shut()

    def close(self, told: list[Told]) -> Iterable[bytes]:
        status = _status(told[0])
        yield self._event(f"response.{status}", response=self._response(status, told[0]))

    def fail(self, failure: Failure) -> Iterable[bytes]:
        error = {"code": failure.code or "server_error", "message": failure.message}
        response = {**self._response("failed", None), "error": error}
        yield self._event("response.failed", response=response)

    def whole(self, told: list[Told]) -> Object:
        (answer,) = told
        thought, text = Delta(thought=answer.thought), Delta(text=answer.text)
        for delta in (thought, text, *(Delta(call=call) for call in answer.calls)):
            for _ in self.tell(0, delta, answer):
                pass
        for _ in self._shut():
            pass
        return self._response(_status(answer), answer)

    def _begin(self, kind: str, item: Object, part: str, extra: Object) -> Iterable[bytes]:
        """A new item with one empty part."""
        yield from self._shut()
        self._open = kind
        item = {"id": f"{kind[:2]}_{secrets.token_hex(12)}", "type": kind, **item}
        item |= {"status": "in_progress", "content": []}
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=self._at, item=item)
        content: Object = {"type": part, "text": "", **extra}
        yield self._text("response.content_part.added", part=content)
        item["content"] = [content]

    def _shut(self) -> Iterable[bytes]:
        """Ends the item that is open."""
        if self._open is None:
            return
        item = self._items[-1]
        part = item["content"][0]
        more = {"logprobs": []} if part["type"] == "output_text" else {}
        yield self._text(f"response.{part['type']}.done", text=part["text"], **more)
        yield self._text("response.content_part.done", part=part)
        item["status"] = "completed"
        self._open = None
        yield self._event("response.output_item.done", output_index=self._at, item=item)

    def _call(self, delta: Delta) -> Iterable[bytes]:
        assert delta.call is not None
        call = call_of(delta.call)
        arguments = call["function"]["arguments"]
        item: Object = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "call_id": call["id"],
            "name": delta.call.name,
            "arguments": "",
            "status": "in_progress",
        }
        self._items.append(item)
        place = {"item_id": item["id"], "output_index": self._at}
        kind = "response.function_call_arguments"
        yield self._event("response.output_item.added", output_index=self._at, item=item)
        yield self._event(f"{kind}.delta", **place, delta=arguments)
        yield self._event(f"{kind}.done", **place, name=delta.call.name, arguments=arguments)
        item |= {"arguments": arguments, "status": "completed"}
        yield self._event("response.output_item.done", output_index=self._at, item=item)

    @property
    def _at(self) -> int:
        return len(self._items) - 1

    def _text(self, kind: str, **what: Any) -> bytes:
        item = self._items[-1]["id"]
        return self._event(kind, item_id=item, output_index=self._at, content_index=0, **what)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return frame({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _response(self, status: str, told: Told | None) -> Object:
        asked = self._asked
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "model": self._job.model,
            "output": json.loads(json.dumps(self._items)),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None if told is None else self._usage(told),
        }

    def _usage(self, told: Told) -> Object:
        found = usage(self._job, [told])
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": found["prompt_tokens_details"],
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": found["completion_tokens_details"],
            "total_tokens": found["total_tokens"],
        }


def _status(told: Told) -> str:
    return "incomplete" if told.reason == "length" else "completed"
