"""Calls go round through each model's own format; answers divide the same however they come."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import chat_formats
import pytest
from chat_formats import tokenizer_and_chat
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from halfbyte.text.answer import Answer, collected
from halfbyte.text.assets import assets_from_directory
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.text.tools import (
    MAX_BODY_CHARACTERS,
    MAX_DEPTH,
    MalformedCallError,
    ToolCall,
    calls_from_gemma,
    calls_from_json,
)

DIALECTS = {"gemma4": "gemma4", "qwen2": "hermes", "qwen3": "hermes", "llama3": "llama3",
            "mistral": "mistral", "chatml": None, "gemma3": None}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
USER = {"role": "user", "content": "Go."}

numbers = st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.\-]{0,8}", fullmatch=True)
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
calls = st.builds(ToolCall, words, st.dictionaries(words, values, max_size=4))


def _exact(call: ToolCall) -> str:
    """Tells 1 from 1.0 and from True."""
    return json.dumps([call.name, call.arguments], sort_keys=True)


@pytest.mark.parametrize("name", DIALECTS)
def test_the_dialect_is_known_from_vocabulary_and_template(name: str) -> None:
    dialect = tokenizer_and_chat(name)[1].grammar.dialect
    assert (dialect and dialect.name) == DIALECTS[name]


def test_the_template_outweighs_the_vocabulary() -> None:
    """A Llama that was tuned to speak as Hermes does has Llama's tokens still."""
    assets = replace(chat_formats.assets("llama3"), template=chat_formats.template("qwen2"))
    dialect = Chat(Tokenizer(assets), assets).grammar.dialect
    assert dialect is not None and dialect.name == "hermes"


@pytest.mark.parametrize("name", [name for name, dialect in DIALECTS.items() if dialect])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_the_template_renders_is_what_is_parsed(data: st.DataObject, name: str) -> None:
    tokenizer, chat = _ready(name)
    most = 1 if name == "llama3" else 3
    wanted = data.draw(st.lists(calls, min_size=1, max_size=most))
    message = Answer("", "", tuple(wanted)).message()
    prompt = chat.render([USER], tools=[TOOL], think=True)
    whole = chat.render([USER, message], tools=[TOOL], think=True, add_generation_prompt=False)
    assert whole[: len(prompt)] == prompt
    generated = whole[len(prompt) :]
    stop = next(i for i, token_id in enumerate(generated) if token_id in chat.stop_ids)
    found = chat.split(generated[:stop], prompt, tools=True)
    assert list(map(_exact, found.calls)) == list(map(_exact, wanted))
    assert (found.text, found.thought, found.notes) == ("", "", ())
    assert tokenizer.decode(generated) != ""


_READY: dict[str, tuple[Tokenizer, Chat]] = {}


def _ready(name: str) -> tuple[Tokenizer, Chat]:
    return _READY.setdefault(name, tokenizer_and_chat(name))


# An answer in parts, each with what it should give; the marks of each format around them.
WRAP = {
    "gemma4": (
        "<|channel>thought\n{}\n<channel|>",
        '<|tool_call>call:f{{a:<|"|>{}<|"|>}}<tool_call|>',
    ),
    "qwen3": (
        "<think>\n{}\n</think>\n\n",
        '\n<tool_call>\n{{"name": "f", "arguments": {{"a": "{}"}}}}\n</tool_call>',
    ),
}
plain = st.from_regex(r"[a-zé漢<>|/ ]{0,12}[a-z.]", fullmatch=True)
parts = st.lists(st.tuples(st.sampled_from(["said", "thought", "call"]), plain), max_size=6)


def _written(name: str, answer: list[tuple[str, str]]) -> str:
    thought, call = WRAP[name]
    forms = {"said": "{}", "thought": thought, "call": call}
    return "".join(forms[kind].format(text) for kind, text in answer)


def _expected(answer: list[tuple[str, str]]) -> Answer:
    wanted = tuple(ToolCall("f", {"a": text}) for kind, text in answer if kind == "call")
    thoughts = [text.strip() for kind, text in answer if kind == "thought"]
    return Answer("".join(t for k, t in answer if k == "said"), "\n".join(thoughts), wanted)


@pytest.mark.parametrize("name", WRAP)
@settings(max_examples=150, deadline=None)
@given(answer=parts)
def test_parts_are_told_apart_on_ids(answer: list[tuple[str, str]], name: str) -> None:
    tokenizer, chat = _ready(name)
    found = chat.split(tokenizer.encode(_written(name, answer), special=True))
    expected = _expected(answer)
    assert (found.calls, found.thought, found.notes) == (expected.calls, expected.thought, ())
    # White space that stands beside marks is no matter of the answer.
    assert re.sub(r"\s", "", found.text) == re.sub(r"\s", "", expected.text)


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> tuple[Tokenizer, Chat]:
    """A vocabulary without a single mark, under Qwen 3's template: marks are letters."""
    found = assets_from_directory(shared_data / "tokenizers" / "gpt2")
    assert found is not None
    found = replace(found, template=chat_formats.template("qwen3"))
    tokenizer = Tokenizer(found)
    return tokenizer, Chat(tokenizer, found)


@settings(max_examples=150, deadline=None)
@given(answer=parts, data=st.data())
def test_letters_divide_the_same_for_every_split(
    answer: list[tuple[str, str]], data: st.DataObject, gpt2: tuple[Tokenizer, Chat]
) -> None:
    tokenizer, chat = gpt2
    text = _written("qwen3", answer) + data.draw(
        st.sampled_from(["", "<", "</thi", "<tool_call", " "])
    )
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    cuts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    ids = [token_id for cut in cuts for token_id in tokenizer.encode(cut, special=True)]
    whole = chat.split(tokenizer.encode(text, special=True), tools=True)
    assert chat.split(ids, tools=True) == whole
    assert list(whole.calls) == list(_expected(answer).calls)


def test_letters_are_calls_only_when_tools_were_offered(gpt2: tuple[Tokenizer, Chat]) -> None:
    tokenizer, chat = gpt2
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    ids = tokenizer.encode(text, special=True)
    assert chat.split(ids) == Answer(text, "")
    assert chat.split(ids, tools=True) == Answer("", "", (ToolCall("f", {}),))


def test_the_spelling_of_a_mark_is_text_where_the_mark_is_a_token() -> None:
    for name, text in (("gemma4", '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'),
                       ("qwen3", "<think>x</think>")):  # fmt: skip
        tokenizer, chat = _ready(name)
        ids = [i for letter in text for i in tokenizer.encode(letter, special=False)]
        assert chat.split(ids, tools=True) == Answer(text, "")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40) | st.binary(max_size=40))
def test_an_answer_without_marks_is_its_decoding(text: str | bytes) -> None:
    for name in ("gemma4", "qwen3", "llama3"):
        tokenizer, chat = _ready(name)
        is_text = isinstance(text, str)
        ids = tokenizer.encode(text, special=False) if is_text else list(text)  # any 256 bytes
        assume(not set("<[{") & set(tokenizer.decode(ids)))  # how every mark begins
        assert chat.split(ids, tools=True) == Answer(tokenizer.decode(ids), "")


def test_half_a_character_ends_at_a_mark() -> None:
    tokenizer, chat = _ready("qwen3")
    half = tokenizer.encode("é", special=False)[:1]
    mark = tokenizer.encode("<think>", special=True)
    rest = tokenizer.encode("hm</think>!", special=True)
    assert chat.split([*half, *mark, *half, *rest]) == Answer("\ufffd!", "\ufffdhm")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(["gemma4", "qwen3", "llama3", "mistral"]))
def test_no_ids_are_an_error(data: st.DataObject, name: str) -> None:
    tokenizer, chat = _ready(name)
    low = st.integers(0, tokenizer.vocab_size - 1)
    marks = st.sampled_from(sorted(chat.grammar.ids))
    ids = data.draw(st.lists(low | marks | marks, max_size=40))
    stream = chat.stream(tools=True)
    pieces = [piece for token_id in ids for piece in stream.push(token_id)]
    pieces += stream.finish()
    assert all(piece.text or piece.call for piece in pieces)
    assert collected(pieces) == chat.split(ids, tools=True)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("gemma4", "So <|tool_call>call:f{a:1}<tool_call|>", "So"),
        ("gemma4", "<|tool_call>call:f{a:1}", ""),  # cut where the model hands over
        ("qwen3", 'Ok.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}', "Ok."),
        ("qwen3", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>\n', ""),
        ("mistral", 'Ok. [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "Ok."),
        ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {"a": 1}}', ""),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', ""),
        ("llama3", '\n{"type": "function", "name": "f", "parameters": {"a": 1}}\n', ""),
    ],
)
def test_a_call(name: str, text: str, said: str) -> None:
    tokenizer, chat = _ready(name)
    found = chat.split(tokenizer.encode(text, special=True), tools=True)
    assert found == Answer(said, "", (ToolCall("f", {"a": 1}),))


def test_parallel_calls_of_llama() -> None:
    tokenizer, chat = _ready("llama3")
    one = '{"name": "f", "parameters": {}}'
    found = chat.split(tokenizer.encode(f"{one}; {one}", special=True), tools=True)
    assert found.calls == (ToolCall("f", {}),) * 2


def test_a_call_inside_a_thought_is_a_call() -> None:
    tokenizer, chat = _ready("gemma4")
    text = "<|channel>thought\nhm <|tool_call>call:f{}<tool_call|>"
    found = chat.split(tokenizer.encode(text, special=True))
    assert found == Answer("", "hm", (ToolCall("f", {}),))


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("gemma4", "<|tool_call>call:f{a:1<tool_call|>", "no ','"),
        ("gemma4", '<|tool_call>call:f{a:<|"|>x}<tool_call|>', "does not end"),
        ("gemma4", "<|tool_call>call:f{a:x}<tool_call|>", "no value"),
        ("gemma4", "<|tool_call>f{a:1}<tool_call|>", "no 'call:'"),
        ("gemma4", "<|tool_call>call:f{a:1}{}<tool_call|>", "something follows"),
        ("gemma4", "<|tool_call><tool_call|>", "no 'call:'"),
        ("gemma4", "<|tool_call>call:f{a:" + "9" * 5000 + "}<tool_call|>", "too long"),
        ("gemma4", "<|tool_call>call:f{a:1e999}<tool_call|>", "too large"),
        ("qwen3", "<tool_call>{</tool_call>", "not JSON"),
        ("qwen3", "<tool_call></tool_call>", "empty"),
        ("qwen3", '<tool_call>{"name": "f"}</tool_call>', "no arguments"),
        ("qwen3", '<tool_call>{"arguments": {}}</tool_call>', "no name"),
        ("qwen3", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "no object"),
        ("qwen3", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN"),
        ("qwen3", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', "half"),
        ("qwen3", "<tool_call><function=f></function></tool_call>", "not JSON"),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arg', "not JSON"),
        ("llama3", "<|python_tag|>print(1)", "not JSON"),
    ],
)
def test_what_is_no_call_is_text_with_a_note(name: str, text: str, why: str) -> None:
    tokenizer, chat = _ready(name)
    found = chat.split(tokenizer.encode("So: " + text, special=True), tools=True)
    assert found.text == "So: " + text
    assert found.calls == () and len(found.notes) == 1 and why in found.notes[0]


def test_an_answer_in_json_is_no_call() -> None:
    tokenizer, chat = _ready("llama3")
    for text in ('{"answer": 42}', "{", '{"name": "Bob"}', '{"a": 1} is JSON'):
        assert chat.split(tokenizer.encode(text, special=True), tools=True) == Answer(text, "")


@pytest.mark.parametrize("shape", ["[" * 10**5, '{"a":' * 10**5, "[" * 40 + "]" * 40])
def test_depth_is_bounded(shape: str) -> None:
    for parse, text in (
        (calls_from_gemma, "call:f{a:" + shape.replace('"', "") + "}"),
        (calls_from_json, '{"name":"f","arguments":{"a":' + shape + "}}"),
    ):
        with pytest.raises(MalformedCallError):
            parse(text)
    deepest: Any = []
    for _ in range(MAX_DEPTH - 2):
        deepest = [deepest]
    text = json.dumps(deepest)
    assert calls_from_gemma(f"call:f{{a:{text}}}") == [ToolCall("f", {"a": deepest})]
    assert calls_from_json(f'{{"name":"f","arguments":{{"a":{text}}}}}')[0].arguments == {
        "a": deepest
    }


def test_an_endless_call_becomes_text() -> None:
    tokenizer, chat = _ready("qwen3")
    stream, shown = chat.stream(tools=True), ""
    (opening,) = tokenizer.encode("<tool_call>", special=True)
    (letter,) = tokenizer.encode("x", special=True)
    list(stream.push(opening))
    for _ in range(MAX_BODY_CHARACTERS + 5):
        shown += collected(stream.push(letter)).text
    assert shown == "<tool_call>" + "x" * (MAX_BODY_CHARACTERS + 5)


@pytest.mark.parametrize(
    ("name", "opening"),
    [("gemma4", "<|channel>thought\n"), ("gemma4", "<|channel>"), ("qwen3", "<think>\n")],
)
def test_a_thought_that_the_prompt_has_opened(name: str, opening: str) -> None:
    tokenizer, chat = _ready(name)
    closing = WRAP[name][0].split("{}")[1]
    prompt = tokenizer.encode("Go." + opening, special=True)
    ids = tokenizer.encode("Hm.\n" + closing + "Yes.", special=True)
    assert chat.split(ids, prompt) == Answer("Yes.", "Hm.")
    assert chat.split(ids[:2], prompt) == Answer("", "Hm")
    closed = tokenizer.encode("Go." + opening + closing, special=True)
    assert chat.split(tokenizer.encode("Yes.", special=True), closed) == Answer("Yes.", "")


def test_an_answer_as_a_message() -> None:
    call = ToolCall("f", {"a": 1})
    assert Answer("Hi", "hm").message() == {"role": "assistant", "content": "Hi"}
    message = Answer("", "hm", (call, call)).message()
    assert message["reasoning_content"] == "hm"
    assert [len(call["id"]) for call in message["tool_calls"]] == [9, 9]
    assert message["tool_calls"][1]["function"] == {"name": "f", "arguments": {"a": 1}}
