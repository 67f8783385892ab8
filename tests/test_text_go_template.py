"""Chat templates in Go: what they render is what the model's own template does."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from chat_formats import FORMATS, assets, ends, template
from go_templates import execute

from halfbyte.errors import UnsupportedError
from halfbyte.formats.ollama import modelfile
from halfbyte.text.assets import TextAssets, assets_from_directory
from halfbyte.text.go_template import Dialogue, Turns, learned
from halfbyte.text.template import ChatTemplate

CONVERSATIONS: list[Turns] = [
    [("user", "Hi there")],
    [("system", 'Say "yes".\n\nAlways.'), ("user", "{{ Hi }} \\ there")],
    [
        ("user", "1"),
        ("assistant", "<x>"),
        ("user", "3\n\n4"),
        ("assistant", "\u4e2d"),
        ("user", "5"),
    ],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3")],
]
SIMPLE = [name for name in FORMATS if name != "mistral"]


def renderer(name: str) -> ChatTemplate:
    return ChatTemplate(template(name))


def rendered(name: str, turns: Turns) -> str:
    bos, eos = ends(name)
    messages = [{"role": role, "content": content} for role, content in turns]
    return renderer(name).render(messages, bos=bos, eos=eos).removeprefix(bos)


def dialogue_of(name: str) -> Dialogue | None:
    return learned(lambda turns: rendered(name, turns))


def in_go(text: str, turns: Turns) -> str:
    """As Ollama calls it."""
    messages = [{"Role": role, "Content": content} for role, content in turns]
    system = "\n\n".join(content for role, content in turns if role == "system")
    return execute(text, {"Messages": messages, "System": system, "Response": ""})


@pytest.mark.parametrize("name", SIMPLE)
def test_go_says_what_the_model_says(name: str) -> None:
    dialogue = dialogue_of(name)
    assert dialogue is not None
    for turns in CONVERSATIONS:
        assert in_go(dialogue.go(), turns) == rendered(name, turns) == dialogue.render(turns)


@pytest.mark.peers
@pytest.mark.parametrize("name", SIMPLE)
def test_go_itself_says_so(name: str, tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs go")
    dialogue = dialogue_of(name)
    assert dialogue is not None
    cases = [[{"Role": role, "Content": text} for role, text in turns] for turns in CONVERSATIONS]
    (tmp_path / "main.go").write_text(PROGRAM)
    said = subprocess.run(
        [go, "run", str(tmp_path / "main.go")],
        input=json.dumps({"Template": dialogue.go(), "Cases": cases}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout) == [rendered(name, turns) for turns in CONVERSATIONS]


def test_an_answer_that_comes_last_is_left_open() -> None:
    dialogue = dialogue_of("chatml")
    assert dialogue is not None
    text = in_go(dialogue.go(), [("user", "Hi"), ("assistant", "Well")])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell"


@pytest.mark.parametrize(
    "source",
    [
        template("mistral"),
        "{{ messages[-1].content | upper }}",
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% if loop.index > 4 %}!{% endif %}"
        "{% endfor %}",
        "{% if messages | length > 5 %}{{ raise_exception('too long') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role != 'system' %}{{ m.role }}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_says_more_has_none(source: str) -> None:
    chat = ChatTemplate(source)
    assert learned(lambda t: chat.render([{"role": r, "content": c} for r, c in t])) is None


def test_a_modelfile(tiny_gemma4: Path) -> None:
    found = assets_from_directory(tiny_gemma4)
    assert found is not None
    made = modelfile(found, "model.gguf")
    lines = made.text.splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert lines[1].startswith('TEMPLATE """') and lines[1].endswith('"""')
    go = lines[1].removeprefix('TEMPLATE """').removesuffix('"""')
    assert '"""' not in go
    prompt = in_go(go, [("system", "S"), ("user", "U")])
    assert prompt == "<|turn>system\nS<turn|>\n<|turn>user\nU<turn|>\n<|turn>model\n"
    assert lines[2:] == [
        "PARAMETER temperature 1",
        "PARAMETER top_k 64",
        "PARAMETER top_p 0.95",
        'PARAMETER stop "<eos>"',
        'PARAMETER stop "<turn|>"',
        'PARAMETER stop "<|tool_response>"',
    ]
    assert "without tools and thoughts" in made.notes[0]


def without_template(found: TextAssets) -> TextAssets:
    return replace(found, template=None)


def test_modelfiles_without_a_template() -> None:
    plain = modelfile(without_template(assets("chatml")), "m.gguf")
    assert 'TEMPLATE "{{ .Prompt }}"' in plain.text and "continues texts" in plain.notes[0]
    for name in ("mistral", "llama3"):  # the latter tells the date
        made = modelfile(assets(name), "m.gguf")
        assert "TEMPLATE" not in made.text and "none is written" in made.notes[0]
    with pytest.raises(UnsupportedError, match="tokenizer"):
        modelfile(None, "m.gguf")


PROGRAM = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var given struct {
		Template string
		Cases    [][]Message
	}
	json.NewDecoder(os.Stdin).Decode(&given)
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	said := []string{}
	for _, messages := range given.Cases {
		var system []string
		for _, message := range messages {
			if message.Role == "system" {
				system = append(system, message.Content)
			}
		}
		var out strings.Builder
		data := map[string]any{"Messages": messages, "System": strings.Join(system, "\\n\\n")}
		if err := parsed.Execute(&out, data); err != nil {
			panic(err)
		}
		said = append(said, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
"""
