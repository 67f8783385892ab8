"""Chat templates as Transformers renders them, within bounds; stops and thoughts on ids."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError, IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.text import sandbox
from halfbyte.text.assets import (
    TextAssets,
    assets_from_directory,
    assets_from_metadata,
    assets_to_metadata,
)
from halfbyte.text.chat import Answer, Chat
from halfbyte.text.template import ChatTemplate
from halfbyte.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "  What is a half byte?\n"}
SYSTEM = {"role": "system", "content": "Be brief. "}
ANSWER = {"role": "assistant", "content": "<|channel>thought\nhm<channel|>A nibble."}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "n"}}},
    },
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, USER],
    [SYSTEM, USER, ANSWER, USER, ANSWER, {"role": "user", "content": "<b>'é' & \"漢\"</b>"}],
]
# Exercises what real templates lean on: namespaces, macros, loop controls, tojson, slices.
BUSY = """{{ bos_token }}{% macro show(m) -%}
[{{ m.role | upper }}]{{ m['content'] | trim }}
{%- endmacro %}
{% set ns = namespace(count=0, text='') %}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% set ns.text = ns.text ~ loop.index ~ ',' %}
    {{- show(m) }}
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% for t in tools or [] %}{{ t.function | tojson(indent=2) }}{% endfor %}
{% generation %}{{ ns.count }}:{{ ns.text[:-1] }}{% endgeneration %}
{{ messages | map(attribute='role') | unique | join('|') }}
{{ '%s=%d' | format('n', 3) }} {{ 'ab' * 2 }}
{{ messages[0].items() | list | length }}{{ messages[-1].content.split(' ')[0] }}{{ 7 % 4 }}
{%- if enable_thinking is defined and enable_thinking %}<think>{% endif %}
{%- if add_generation_prompt %}{{ 'go' + eos_token }}{% endif %}"""


@pytest.fixture(scope="module")
def assets(tiny_gemma4: Path) -> TextAssets:
    found = assets_from_directory(tiny_gemma4)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def chat(assets: TextAssets) -> Chat:
    return Chat(Tokenizer(assets), assets)


@pytest.fixture(scope="module")
def theirs(tiny_gemma4: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_gemma4))


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("think", [None, True, False])
@pytest.mark.parametrize("prompt", [True, False])
def test_ids_equal_transformers(
    messages: list[dict[str, Any]], think: bool | None, prompt: bool, chat: Chat, theirs: Any
) -> None:
    options = {} if think is None else {"enable_thinking": think}
    expected = theirs.apply_chat_template(
        messages, add_generation_prompt=prompt, return_dict=False, **options
    )
    assert chat.render(messages, think=think, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [TOOL, TOOL]])
@pytest.mark.parametrize("think", [None, True])
def test_a_busy_template_equals_transformers(
    messages: list[dict[str, Any]], tools: Any, think: bool | None, theirs: Any
) -> None:
    options = {} if think is None else {"enable_thinking": think}
    expected = theirs.apply_chat_template(
        messages,
        chat_template=BUSY,
        tools=tools,
        tokenize=False,
        add_generation_prompt=True,
        **options,
    )
    ours = ChatTemplate(BUSY).render(
        messages, bos="<bos>", eos="<eos>", tools=tools, enable_thinking=think
    )
    assert ours == expected


def _grow(start: str, step: str) -> str:
    loop = "{% for i in range(60) %}{% set n.x = " + step + " %}{% endfor %}"
    return "{% set n = namespace(x=" + start + ") %}" + loop


LOOP = "{% for i in range(99999) %}"
HOSTILE = {
    "long range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": LOOP + LOOP + "{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "repetition": "{{ 'a' * 1000000000 }}",
    "power": "{{ 9 ** 99999999 }}",
    "squares": _grow("3", "n.x * n.x"),
    "doubling": _grow("'ab'", "n.x ~ n.x"),
    "sums": _grow("'ab'", "n.x + n.x"),
    "nesting": _grow("[1]", "[n.x, n.x]") + "{{ n.x }}",
    "json": _grow("[1]", "[n.x, n.x]") + "{{ n.x|tojson }}",
    "replace": "{% set a = 'x' * 4000000 %}{{ a.replace('x', a) }}",
    "join": "{% set a = 'x' * 4000000 %}{{ range(90000) | join(a) }}",
    "block": "{% set a = 'x' * 4000000 %}{% set b %}" + LOOP + "{{ a }}{% endfor %}{% endset %}",
    "literal": LOOP + "y" * 9999 + "{% endfor %}",
    "width": "{{ 'a' | center(1000000000) }}",
    "method width": "{{ 'a'.ljust(1000000000) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "old format": "{{ '%1000000000d' % 1 }}",
    "star format": "{{ '%*d' | format(1000000000, 1) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ self.__init__.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "mutation": "{{ messages.append(1) }}",
    "syntax": "{% if %}",
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "size": "x" * (2**16 + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_quickly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    start = time.thread_time()
    with pytest.raises(IntegrityError, match="chat template"):
        ChatTemplate(HOSTILE[name]).render([USER])
    assert time.thread_time() - start < 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ nothing.at.all }}",
        "{{ 1 + 'a' }}",
        "{% include 'file' %}",
        "{% import 'os' as os %}",
    ],
)
def test_failures_on_the_messages_are_the_callers(source: str) -> None:
    with pytest.raises(InvalidInputError, match="hint"):
        ChatTemplate(source).render([USER])


def test_a_template_stays_usable_after_a_failure() -> None:
    template = ChatTemplate("{{ messages[0].content.upper() }}")
    with pytest.raises(HalfbyteError):
        template.render([])
    assert template.render([{"content": "a"}]) == "A"


def test_stop_ids_from_either_file_kind(assets: TextAssets, stories260k: Path) -> None:
    official = assets_to_metadata(assets)
    del official["halfbyte.eos_token_ids"]  # as other tools write it
    for metadata in (assets_to_metadata(assets), official):
        found = assets_from_metadata(metadata)
        assert found is not None
        assert Chat(Tokenizer(found), found).stop_ids == {1, 106, 50}
    stories = assets_from_directory(stories260k)
    assert stories is not None
    assert Chat(Tokenizer(stories), stories).stop_ids == {1, 2}


def test_the_template_alone_tells_the_end_of_a_turn(assets: TextAssets) -> None:
    silent = replace(assets, generation=replace(assets.generation, eos_ids=()))
    tokenizer = Tokenizer(silent)
    asks = tokenizer.token_id("<|tool_response>")  # for a tool's result; the model waits for it
    assert Chat(tokenizer, silent).stop_ids == {tokenizer.token_id("<turn|>"), asks}
    spaced = replace(
        silent, template="{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}"
    )
    assert Chat(tokenizer, spaced).stop_ids == {tokenizer.token_id("<eos>"), asks}
    for template in ("{{ raise_exception('no') }}", "{{ messages[1].content }}\n", None):
        assert Chat(tokenizer, replace(silent, template=template)).stop_ids == {asks}


@pytest.mark.parametrize("template", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_bos_is_there_once(template: str, assets: TextAssets) -> None:
    found = replace(assets, template=template + "{{ messages[0].content }}")
    ids = Chat(Tokenizer(found), found).render([{"role": "user", "content": "Hi"}])
    assert ids[0] == found.bos_id
    assert ids.count(ids[0]) == 1


def test_a_model_without_a_template_points_to_raw(assets: TextAssets) -> None:
    bare = replace(assets, template=None)
    with pytest.raises(UnsupportedError, match="--raw"):
        Chat(Tokenizer(bare), bare).render([USER])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A nibble.", Answer("A nibble.", "")),
        (
            "<|channel>thought\nFour bits.\n<channel|>A nibble.<turn|>",
            Answer("A nibble.", "Four bits."),
        ),
        ("<|channel>thought\n<channel|>A nibble.", Answer("A nibble.", "")),
        ("<|channel>thought\nFour bi", Answer("", "Four bi")),
        ("Four bits.<channel|>A nibble.", Answer("Four bits.A nibble.", "")),
        ("<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d", Answer("bd", "a\nc")),
        ("", Answer("", "")),
    ],
)
def test_thoughts_are_told_apart_on_ids(
    answer: str, expected: Answer, chat: Chat, assets: TextAssets
) -> None:
    assert chat.split(Tokenizer(assets).encode(answer, special=True)) == expected


def test_generation_defaults(assets: TextAssets, stories260k: Path) -> None:
    defaults = assets.generation
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (1.0, 64, 0.95)
    assert defaults.suppress_ids == (116, 114)
    stories = assets_from_directory(stories260k)
    assert stories is not None
    assert stories.generation.temperature == 0  # do_sample is false
    single = assets_to_metadata(assets) | {"general.sampling.top_p": 0.949999988079071}
    found = assets_from_metadata(single)
    assert found is not None
    assert found.generation.top_p == 0.95


@pytest.mark.parametrize("style", ["string", "list", "json"])
def test_templates_are_found_where_models_keep_them(
    style: str, stories260k: Path, tmp_path: Path
) -> None:
    values = {
        "string": ("tokenizer_config.json", '{"chat_template": "T"}'),
        "list": (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": "R"},'
            '{"name": "default", "template": "T"}]}',
        ),
        "json": ("chat_template.json", '{"chat_template": "T"}'),
    }
    (tmp_path / "tokenizer.json").write_text((stories260k / "tokenizer.json").read_text())
    name, content = values[style]
    (tmp_path / name).write_text(content)
    found = assets_from_directory(tmp_path)
    assert found is not None
    assert found.template == "T"
