"""Anthropic's messages and OpenAI's responses: their words, their events, their order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, serving

from halfbyte.llm import LLM
from halfbyte.serve import anthropic, responses
from halfbyte.serve.failure import Failure
from halfbyte.serve.wire import MessagesRequest, ResponsesRequest
from halfbyte.specs import LoadOptions

TEMPLATE = Path(__file__).parent / "templates" / "gemma4.jinja"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
}
GO_ON = {"temperature": 0.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    template = TEMPLATE.read_text(encoding="utf-8")
    llm = LLM("demo", LoadOptions(context=1024, threads=1, parallel=2), template=template)
    with serving(llm) as it:
        yield it


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_a_message_is_what_a_chat_completion_says(served: Served):
    chat = served.chat("Who are you?", enable_thinking=False, **GO_ON)
    message = served.post("/v1/messages?beta=true", messages=user("Who are you?"), **GO_ON).json
    assert message["type"] == "message" and message["role"] == "assistant"
    assert [block["type"] for block in message["content"]] == ["text"]
    assert message["content"][0]["text"] == chat.text
    usage = message["usage"]
    tokens = chat.json["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == tokens["prompt_tokens"]
    assert usage["output_tokens"] == tokens["completion_tokens"]
    counted = served.post("/v1/messages/count_tokens", messages=user("Who are you?")).json
    assert counted == {"input_tokens": tokens["prompt_tokens"]}


def test_the_events_of_a_message(served: Served):
    whole = served.post("/v1/messages", messages=user("Who are you?"), **GO_ON).json
    stream = served.post("/v1/messages", messages=user("Who are you?"), stream=True, **GO_ON)
    names = [name for name, _ in stream.events]
    assert all(name == data["type"] for name, data in stream.events)
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    text = "".join(it["delta"]["text"] for it in stream.frames if it["type"].endswith("k_delta"))
    assert text == whole["content"][0]["text"]
    delta = stream.frames[-2]
    assert delta["delta"]["stop_reason"] == whole["stop_reason"]
    assert delta["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_a_stop_sequence_is_named(served: Served):
    text = served.post("/v1/messages", messages=user("Who are you?"), **GO_ON).json
    stop = text["content"][0]["text"][3:6]
    cut = served.post(
        "/v1/messages", messages=user("Who are you?"), stop_sequences=[stop], **GO_ON
    ).json
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", stop)


def test_tools_of_messages(served: Served):
    tools = [{"name": "weather", "input_schema": WEATHER}, {"type": "web_search", "name": "web"}]
    body = {
        "messages": user("x"),
        "tools": tools,
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        "max_tokens": 300,
        "temperature": 0.0,
    }
    message = served.post("/v1/messages", **body).json
    (use,) = [block for block in message["content"] if block["type"] == "tool_use"]
    assert message["stop_reason"] == "tool_use" and use["name"] == "weather"
    assert use["input"].keys() == {"city"} and use["id"].startswith("toolu_")
    stream = served.post("/v1/messages", stream=True, **body)
    parts = [it["delta"] for it in stream.frames if it["type"] == "content_block_delta"]
    text = "".join(it["partial_json"] for it in parts if it["type"] == "input_json_delta")
    assert json.loads(text) == use["input"]
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [
        {"type": "text", "text": "31 degrees"}]}  # fmt: skip
    body["messages"] += [
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    body |= {"tool_choice": {"type": "none"}, "max_tokens": 3}
    assert served.post("/v1/messages", **body).status == 200


def test_messages_become_a_conversation():
    request = MessagesRequest.model_validate({
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
            ]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]},
        ],
        "thinking": {"type": "enabled", "budget_tokens": 100},
    })  # fmt: skip
    chat = anthropic.as_chat(request)
    assert [it.role for it in chat.messages] == ["system", "user", "assistant", "tool"]
    assert chat.messages[2].reasoning_content == "hm"
    assert chat.messages[2].tool_calls[0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    picture = {"role": "user", "content": [{"type": "image", "source": {}}]}
    with pytest.raises(Failure) as refusal:
        anthropic.as_chat(MessagesRequest.model_validate({"max_tokens": 5, "messages": [picture]}))
    assert "image" in refusal.value.message and refusal.value.param == "messages.0.content.0"


def test_errors_in_anthropics_words(served: Served):
    reply = served.post("/v1/messages", messages=user("x" * 5000), max_tokens=3)
    assert reply.status == 400 and reply.json["type"] == "error"
    assert "maximum context length is 1024" in reply.json["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": []}],
        [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "a", "name": "f", "input": {}} for _ in range(200)]}],
        [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a"} for _ in range(3000)]}],
    ],
)  # fmt: skip
def test_what_becomes_no_valid_conversation_is_refused(served: Served, messages):
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        reply = served.post(path, messages=messages, max_tokens=1)
        assert reply.status == 400 and "List should have" in reply.json["error"]["message"]


def test_a_response_is_what_a_chat_completion_says(served: Served):
    chat = served.chat("Who are you?", **GO_ON)
    asked = {"temperature": 0.0, "max_output_tokens": 24}
    found = served.post("/v1/responses", input="Who are you?", **asked).json
    assert found["object"] == "response" and found["store"] is False
    messages = [item for item in found["output"] if item["type"] == "message"]
    assert messages[0]["content"][0]["text"] == chat.text
    assert found["usage"]["total_tokens"] == chat.json["usage"]["total_tokens"]
    listed = [{"type": "message", "role": "user", "content": [
        {"type": "input_text", "text": "Who are you?"}]}]  # fmt: skip
    again = served.post("/v1/responses", input=listed, **asked).json
    assert [it["content"] for it in again["output"]] == [it["content"] for it in found["output"]]


def test_the_events_of_a_response(served: Served):
    asked = {"temperature": 0.0, "max_output_tokens": 24, "input": "Who are you?"}
    whole = served.post("/v1/responses", **asked).json
    stream = served.post("/v1/responses", stream=True, **asked)
    frames = stream.frames
    assert all(name == data["type"] for name, data in stream.events)
    assert [it["sequence_number"] for it in frames] == list(range(len(frames)))
    kinds = [it["type"] for it in frames]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole['status']}",
    ]
    text = "".join(it["delta"] for it in frames if it["type"] == "response.output_text.delta")
    last = frames[-1]["response"]
    assert last["output"][-1]["content"][0]["text"] == text
    assert text == whole["output"][-1]["content"][0]["text"]
    ids = {it["item_id"] for it in frames if "item_id" in it}
    assert ids == {item["id"] for item in last["output"]}


def test_calls_of_responses(served: Served):
    tools = [{"type": "function", "name": "weather", "parameters": WEATHER}]
    tools.append({"type": "namespace"})
    named = {"type": "function", "name": "weather"}
    asked = {"input": "x", "tools": tools, "tool_choice": named, "temperature": 0.0,
             "parallel_tool_calls": False, "max_output_tokens": 300}  # fmt: skip
    stream = served.post("/v1/responses", stream=True, **asked).frames
    (done,) = [it for it in stream if it["type"] == "response.function_call_arguments.done"]
    item = stream[-1]["response"]["output"][-1]
    assert item["type"] == "function_call" and item["arguments"] == done["arguments"]
    assert json.loads(item["arguments"]).keys() == {"city"}
    output = {"type": "function_call_output", "call_id": item["call_id"], "output": "31"}
    history = [{"role": "user", "content": "x"}, item, output]
    asked |= {"input": history, "tool_choice": "auto", "max_output_tokens": 3}
    assert served.post("/v1/responses", **asked).status == 200


def test_structured_responses(served: Served):
    text = {"format": {"type": "json_schema", "name": "w", "schema": {
        **WEATHER, "additionalProperties": False}}}  # fmt: skip
    asked = {"input": "x", "text": text, "max_output_tokens": 300, "seed": 1}
    found = served.post("/v1/responses", reasoning={"effort": "none"}, **asked).json
    (message,) = [item for item in found["output"] if item["type"] == "message"]
    assert json.loads(message["content"][0]["text"]).keys() == {"city"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{}]}, "input.0"),
        ({"input": []}, "input"),
    ],
)
def test_what_a_stateless_server_cannot_do_is_refused(fields, param):
    request = ResponsesRequest.model_validate({"input": "x", **fields})
    with pytest.raises(Failure) as refusal:
        responses.as_chat(request)
    assert refusal.value.param == param and refusal.value.status == 400


def test_other_tools_items_are_passed_over():
    items = [
        {"type": "web_search_call", "id": "x"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"role": "user", "content": "go on"},
    ]
    chat = responses.as_chat(ResponsesRequest.model_validate({"input": items}))
    assert [it.role for it in chat.messages] == ["assistant", "tool", "user"]
    assert chat.messages[0].reasoning_content == "hm"
