"""Guides: what an answer may not do. Functions of its ids, whatever was asked for before."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.engine.sampling import bits
from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import read
from halfbyte.formats.reference import demo_path
from halfbyte.text.callgrammar import grammar_of_calls
from halfbyte.text.chat import Chat
from halfbyte.text.guides import AnswerGuide, Rules, Sign
from halfbyte.text.loops import EVERY, SPAN, circling
from halfbyte.text.structure import Structures, all_but, only
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.text.tools import DIALECTS

VOCAB = 64
OPEN, CLOSE, STOP = 60, 61, 62
THINKS = {"opens": Sign((OPEN,)), "closes": Sign((CLOSE,)), "stop_ids": (STOP,), "vocab": VOCAB}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def ids_of(mask: bytes | None) -> set[int] | None:
    return None if mask is None else set(np.flatnonzero(bits(mask, VOCAB)).tolist())


@given(st.integers(1, 128), st.integers(0, 3))
def test_circles_are_seen_when_they_have_gone_on_for_long(run, extra):
    ids = [9] * 7 + [*range(run)] * ((SPAN + 2 * EVERY) // run + 1)
    ids = ids[: SPAN + EVERY]
    assert circling(ids)
    assert not circling(ids[: SPAN - EVERY])
    assert not circling(ids[:SPAN])  # nines are in it
    assert not circling([*ids[:-5], 500, *ids[-4:]])
    assert not circling([*ids, *[1] * (1 + extra)])  # looked for every so often only


def test_what_only_resembles_a_circle_is_none():
    assert not circling([index * index % 4093 for index in range(SPAN)])
    assert not circling(list(range(200)) * 8)  # a run too long to be one


@given(st.sets(st.integers(0, VOCAB - 1)))
def test_masks(ids):
    assert ids_of(only(sorted(ids))) == ids
    assert ids_of(all_but(sorted(ids), VOCAB)) == set(range(VOCAB)) - ids


def test_a_thought_ends_when_its_budget_is_used_up():
    guide = AnswerGuide(Rules(budget=3, **THINKS))
    assert guide.allowed([5, OPEN, 1, 2]) is None
    assert ids_of(guide.allowed([5, OPEN, 1, 2, 3])) == {CLOSE}
    assert guide.allowed([5, OPEN, 1, 2, 3, CLOSE]) is None
    assert guide.allowed([5, OPEN, 1, 2, 3, CLOSE, 7, 7, 7, 7, 7]) is None
    # Another thought has a budget of its own.
    assert ids_of(guide.allowed([5, OPEN, 1, CLOSE, 7, OPEN, 1, 2, 3])) == {CLOSE}


def test_a_thought_that_the_prompt_has_opened_counts_from_there():
    guide = AnswerGuide(Rules(budget=2, thinking=True, **THINKS))
    assert guide.allowed([1]) is None and ids_of(guide.allowed([1, 2])) == {CLOSE}
    assert ids_of(AnswerGuide(Rules(budget=0, thinking=True, **THINKS)).allowed([])) == {CLOSE}


def test_a_mark_of_several_tokens_is_written_out():
    rules = Rules(budget=1, thinking=True, closes=Sign((7, 8, 9)), stop_ids=(STOP,))
    guide = AnswerGuide(rules)
    for written, expected in (([1], {7}), ([1, 7], {8}), ([1, 7, 8], {9}), ([1, 7, 8, 9], None)):
        assert ids_of(guide.allowed(written)) == expected


def test_circles_end_a_thought_and_an_answer():
    guide = AnswerGuide(Rules(**THINKS))
    circle = [1, 2] * 256
    assert ids_of(guide.allowed([OPEN, *circle])) == {CLOSE}
    assert ids_of(guide.allowed(circle)) == {STOP}
    assert guide.allowed(circle[:-2]) is None
    free = AnswerGuide(Rules(breaks_circles=False, **THINKS))
    assert free.allowed(circle) is None and free.allowed([OPEN, *circle]) is None


written = st.lists(st.sampled_from([1, 2, OPEN, CLOSE]), max_size=30)


@settings(deadline=None)
@given(st.lists(st.tuples(written, st.integers(0, 30)), min_size=1, max_size=8))
def test_a_guide_is_a_function_of_the_ids(asked):
    """Asked about drafts that are taken back, it says what a fresh one says."""
    guide, ids = AnswerGuide(Rules(budget=4, **THINKS)), []
    for more, back in asked:
        ids = [*ids[: max(0, len(ids) - back)], *more]
        assert guide.allowed(ids) == AnswerGuide(Rules(budget=4, **THINKS)).allowed(ids)


@cache
def chat() -> Chat:
    assets = read(demo_path()).assets
    assert assets is not None
    return Chat(Tokenizer(assets), assets)


def words() -> Tokenizer:
    return chat()._tokenizer


def structures() -> Structures:
    return chat().structures


def allows(guide, ids: list[int], token_id: int) -> bool:
    mask = guide.allowed(ids)
    return mask is None or bool(bits(mask, words().vocab_size)[token_id])


def encoded(text: str, *, special: bool = False) -> list[int]:
    return words().encode(text, special=special)


def accepts(structure, text: str, *, special: bool = False) -> bool:
    """Whether the text may be written, and then the answer end."""
    ids = encoded(text, special=special)
    so_far = (allows(structure, ids[:place], token) for place, token in enumerate(ids))
    return all(so_far) and any(allows(structure, ids, stop) for stop in chat().stop_ids)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"a": 1, "b": "x"}', True),
        ('{"a":1,"b":""}', True),
        ('{\n  "a": -12,\n  "b": "\u00e9 {"\n}', True),
        ('{"a": 1}', False),
        ('{"a": "1", "b": "x"}', False),
        ('{"a": 1, "b": "x", "c": 2}', False),
        ("Sure: {}", False),
        ("[]", False),
    ],
)
def test_a_schema_allows_what_follows_it(text, fits):
    assert accepts(structures().of_schema(SCHEMA), text) == fits


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6))
def test_a_structure_follows_drafts_back_and_forth(moves):
    structure = structures().of_schema(SCHEMA)
    right = encoded('{"a": 123456, "b": "some text here"}')
    wrong = encoded("king king king king")
    for place, drafted in moves:
        ids = [*right[:place], *wrong[: drafted % 3], *right[place : place + drafted % 5]]
        assert structure.allowed(ids) == structures().of_schema(SCHEMA).allowed(ids)


def test_in_front_of_a_structure_there_may_be_a_thought():
    rules = chat().guide([], room=500, structure=structures().of_schema(SCHEMA))
    assert rules is not None
    opens, closes = (words().token_id(mark) for mark in ("<|channel>", "<channel|>"))
    stop = min(chat().stop_ids)
    king, brace = encoded("king")[0], encoded("{")[0]
    assert allows(rules, [], opens) and allows(rules, [], brace) and not allows(rules, [], king)
    assert allows(rules, [opens], king) and not allows(rules, [opens], stop)
    assert not allows(rules, [opens, king, closes], king)
    assert allows(rules, [opens, king, closes], brace)
    quiet = chat().guide([], room=500, structure=structures().of_schema(SCHEMA), may_think=False)
    assert not allows(quiet, [], opens)


TOOLS = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    },
    {"name": "time"},
]
GEMMA, HERMES, MISTRAL, LLAMA = DIALECTS


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>', True),
        ('<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3,unit:<|"|>C<|"|>}<tool_call|>', True),
        ('<|tool_call>call:time{}<tool_call|>', True),
        ('<|tool_call>call:time{a:[1,{b:null}],c:true}<tool_call|>', True),
        ('<|tool_call>call:weather{days:3}<tool_call|>', False),
        ('<|tool_call>call:weather{city:<|"|>Rome<|"|>,unit:<|"|>K<|"|>}<tool_call|>', False),
        ('<|tool_call>call:king{}<tool_call|>', False),
        ("king", False),
    ],
)  # fmt: skip
def test_calls_in_gemmas_dialect(text, fits):
    structure = structures().of_calls(TOOLS, GEMMA, several=False)
    assert accepts(structure, text, special=True) == fits
    if fits:
        assert len(chat().split(encoded(text, special=True), tools=True).calls) == 1
        twice = structures().of_calls(TOOLS, GEMMA, several=True)
        assert not accepts(structure, text + text, special=True)
        assert accepts(twice, text + text, special=True)


@pytest.mark.parametrize("required", [[], ["b"], ["a", "c"], ["a", "b", "c"], "b", 5])
def test_what_is_not_required_may_be_left_out(required):
    """Every choice of properties, in their order; what is no list of names requires nothing."""
    properties = {name: {"type": "boolean"} for name in "abc"}
    schema = {"type": "object", "properties": properties, "required": required}
    tools = [{"name": "f", "parameters": schema}]
    needed = set(required) if isinstance(required, list) else set()
    for number in range(8):
        chosen = [name for place, name in enumerate("abc") if number >> place & 1]
        inside = ",".join(f"{name}:true" for name in chosen)
        structure = structures().of_calls(tools, GEMMA, several=False)
        text = f"<|tool_call>call:f{{{inside}}}<tool_call|>"
        assert accepts(structure, text, special=True) == (needed <= set(chosen)), text
    structure = structures().of_calls(tools, GEMMA, several=False)
    assert not accepts(structure, "<|tool_call>call:f{c:true,a:true}<tool_call|>", special=True)


def test_a_grammar_grows_with_its_schema_and_no_faster():
    def length(schema: object) -> int:
        tools = [{"name": "f", "parameters": schema}]
        return len(grammar_of_calls(tools, GEMMA, lambda _: True, several=False))

    def wide(count: int, inner: object) -> dict[str, object]:
        return {"type": "object", "properties": {f"p{index}": inner for index in range(count)}}

    def deep(depth: int) -> object:
        properties = {f"p{index}": {} for index in range(7)}
        inner = {"type": "array", "items": deep(depth - 1)} if depth else {}
        return {"type": "object", "properties": {**properties, "more": inner}}

    assert length(wide(2000, {})) < 12 * length(wide(200, {}))
    assert length(deep(4)) < 6 * length(deep(1))


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'),
        (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]'),
        (LLAMA, '{"name": "weather", "parameters": {"city": "Rome"}}'),
    ],
)
def test_calls_in_json_dialects(dialect, text):
    structure = structures().of_calls(TOOLS, dialect, several=False)
    assert accepts(structure, text)
    assert not accepts(structure, text.replace("weather", "king"))
    assert not accepts(structure, text.replace('"Rome"', "1"))
    body = text.removeprefix(dialect.opens).removesuffix(dialect.closes or "")
    assert dialect.parse(body)[0].arguments == {"city": "Rome"}


def test_every_call_grammar_compiles():
    for dialect in DIALECTS:
        for several in (False, True):
            text = grammar_of_calls(TOOLS, dialect, lambda _: False, several=several)
            assert text.startswith("start: ")
            structures().of_calls(TOOLS, dialect, several=several)


@pytest.mark.parametrize(
    ("schema", "words_of_it"),
    [
        ({"not": {}}, '"not"'),
        ({"type": "object", "if": {}, "then": {}}, '"if", "then"'),
        ({"type": "strin"}, "strin"),
        ({"pattern": "(", "type": "string"}, "regex"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_by_name(schema, words_of_it):
    with pytest.raises(InvalidInputError, match=words_of_it.replace('"', ".")):
        structures().of_schema(schema)


def test_a_schema_is_bounded():
    deep: dict[str, object] = {}
    for _ in range(70):
        deep = {"items": deep}
    for schema in (deep, {"description": "x" * 300_000}):
        with pytest.raises(InvalidInputError, match="64 deep"):
            structures().of_schema(schema)


def test_the_templates_of_these_tests_are_there():
    assert (Path(__file__).parent / "templates" / "gemma4.jinja").exists()
    assert json.dumps(SCHEMA)
