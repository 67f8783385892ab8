"""Every chat format renders as Transformers renders it; conversations with tools go round."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import chat_formats
import pytest
from chat_formats import FORMATS, tokenizer_and_chat
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.text.answer import Answer
from halfbyte.text.chat import Chat
from halfbyte.text.messages import prepared
from halfbyte.text.template import ChatTemplate
from halfbyte.text.tools import ToolCall

SYSTEM = {"role": "system", "content": "Be brief. "}
USER = {"role": "user", "content": "  Is it warm in Zürich, 'or' <b>not</b>?\n"}
ANSWER = {"role": "assistant", "content": "Yes & no."}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather of a "city" — now.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}


def _call(identity: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}


def _result(identity: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": identity, "content": text}


CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "I must look.",
    "tool_calls": [_call("call00000", city="Zürich", days=[1, 2], deep={"a": None, "b": True})],
}
CALLS = {**CALL, "tool_calls": [*CALL["tool_calls"], _call("call00001", city="Rome")]}
RESULTS = [_result("call00000", "warm"), _result("call00001", '{"t": 20}')]
OLD_THOUGHTS = {
    "gemma4": "<|channel>thought\nsecret<channel|>Yes.",
    "qwen3": "<think>\nsecret\n</think>\n\nYes.",
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "long": [SYSTEM, USER, ANSWER, USER, ANSWER, USER],
    "answered": [USER, ANSWER],
    "twice": [USER, USER],
    "late system": [USER, SYSTEM],
    "called": [SYSTEM, USER, CALL],
    "result": [USER, CALL, RESULTS[0]],
    "parallel": [USER, CALLS, *RESULTS],
    "looked": [USER, CALLS, *RESULTS, ANSWER, USER],
    "thoughts": [USER, {"role": "assistant", "content": OLD_THOUGHTS["gemma4"]}, USER],
    "old thoughts": [USER, {"role": "assistant", "content": OLD_THOUGHTS["qwen3"]}, USER],
}
REFUSED = {
    ("gemma3", "twice"), ("gemma3", "late system"), ("gemma3", "result"),
    ("gemma3", "parallel"), ("gemma3", "looked"), ("mistral", "twice"), ("mistral", "late system"),
    ("llama3", "parallel"), ("llama3", "looked"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("think", [None, True, False])
@pytest.mark.parametrize("prompt", [True, False])
def test_formats_render_as_transformers_does(
    name: str, conversation: str, think: bool | None, prompt: bool
) -> None:
    source, messages = chat_formats.template(name), CONVERSATIONS[conversation]
    bos, eos = chat_formats.ends(name)
    thinking = {} if think is None else {"enable_thinking": think}
    for tools in (None, [WEATHER, WEATHER]):
        options = {"tools": tools, "add_generation_prompt": prompt, **thinking}

        def ours(options: dict[str, Any] = options) -> str:
            return ChatTemplate(source).render(messages, bos=bos, eos=eos, **options)

        def theirs(options: dict[str, Any] = options) -> str:
            ends = {"bos_token": bos, "eos_token": eos}
            chats = [copy.deepcopy(messages)]
            return render_jinja_template(chats, chat_template=source, **ends, **options)[0][0]

        if (name, conversation) in REFUSED:
            with pytest.raises(InvalidInputError, match="refuses these messages"):
                ours()
            with pytest.raises(TemplateError):
                theirs()
        else:
            assert ours() == theirs()


def _text(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer, chat = tokenizer_and_chat(name)
    return tokenizer.decode(chat.render(messages, **options), skip_special=False)


@pytest.mark.parametrize(("name", "conversation"), sorted(REFUSED))
def test_a_refused_conversation_says_what_to_do(name: str, conversation: str) -> None:
    with pytest.raises(InvalidInputError, match="hint: "):
        _text(name, CONVERSATIONS[conversation])


@pytest.mark.parametrize("name", OLD_THOUGHTS)
def test_old_thoughts_stay_out_of_the_prompt(name: str) -> None:
    old = {"role": "assistant", "content": OLD_THOUGHTS[name], "reasoning_content": "secret"}
    text = _text(name, [USER, old, USER], think=True)
    assert "secret" not in text and "Yes." in text
    assert "I must look." not in _text(name, CONVERSATIONS["looked"])
    assert "I must look." in _text(name, CONVERSATIONS["result"])


@pytest.mark.parametrize("name", ["gemma4", "qwen2", "mistral"])
def test_arguments_may_be_json_as_clients_send_them(name: str) -> None:
    sent: list[dict[str, Any]] = copy.deepcopy(CONVERSATIONS["parallel"])
    for call in sent[1]["tool_calls"]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    for message in sent[2:]:
        del message["name"]  # a client names the call instead
    before = copy.deepcopy(sent)
    assert _text(name, sent) == _text(name, CONVERSATIONS["parallel"])
    assert sent == before


@pytest.mark.parametrize("arguments", ["{", "[1]", "NaN", '{"a": NaN}', "[" * 100_000, 3, None])
def test_arguments_that_are_no_object_are_the_callers_mistake(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(InvalidInputError, match="message 0, tool call 'f'"):
        prepared([{"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize("call", ["f", {"function": "f"}, 3])
def test_calls_that_are_none_are_the_callers_mistake(call: Any) -> None:
    with pytest.raises(InvalidInputError, match="an object with a function"):
        prepared([{"role": "assistant", "tool_calls": [call]}])


def test_messages_without_calls_stay_as_they_are() -> None:
    assert prepared([SYSTEM, USER]) == [SYSTEM, USER]
    assert prepared([{"role": "tool", "content": "x"}]) == [{"role": "tool", "content": "x"}]


@pytest.mark.parametrize("name", ["chatml", "gemma3"])
def test_tools_are_not_dropped_in_silence(name: str) -> None:
    with pytest.raises(UnsupportedError, match="no place for tools"):
        _text(name, [USER], tools=[WEATHER])


def test_who_can_think() -> None:
    can = {name: tokenizer_and_chat(name)[1].can_think for name in FORMATS}
    assert [name for name in FORMATS if can[name]] == ["gemma4", "qwen3"]


def test_gemma4_keeps_call_response_and_answer_in_one_turn() -> None:
    """What the next prompt begins with is what was computed already, to the last id."""
    tokenizer, chat = tokenizer_and_chat("gemma4")
    prompt = chat.render([USER], think=True, tools=[WEATHER])
    generated = tokenizer.encode(
        '<|channel>thought\nI must look.\n<channel|><|tool_call>call:weather{city:<|"|>Rome<|"|>}'
        "<tool_call|>",
        special=True,
    )
    stop = tokenizer.token_id("<|tool_response>")
    assert stop in chat.stop_ids
    answer = chat.split(generated, prompt)
    assert answer == Answer("", "I must look.", (ToolCall("weather", {"city": "Rome"}),))
    again = chat.render(
        [USER, answer.message(), _result("call00000", "warm")], think=True, tools=[WEATHER]
    )
    computed = [*prompt, *generated, stop]
    assert again[: len(computed)] == computed
    rest = tokenizer.decode(again[len(computed) :], skip_special=False)
    assert rest == ('response:weather{value:<|"|>warm<|"|>}<tool_response|><|channel>thought\n')
    more = tokenizer.encode("Warm!<channel|>It is warm.", special=True)
    assert chat.split(more, again) == Answer("It is warm.", "Warm!")


def test_llama3_stops_where_it_hands_over() -> None:
    tokenizer, chat = tokenizer_and_chat("llama3")
    expected = {tokenizer.token_id("<|eot_id|>"), tokenizer.token_id("<|eom_id|>")}
    assert chat.stop_ids == expected


def test_a_model_without_a_template_gets_none_of_ours() -> None:
    tokenizer, _ = tokenizer_and_chat("chatml")
    bare = Chat(tokenizer, replace(chat_formats.assets("chatml"), template=None))
    with pytest.raises(UnsupportedError, match="--template FILE"):
        bare.render([USER])
    assert not bare.can_think
