"""A chat template in the language of Ollama: learned from the model's own, and proved on it.

Ollama runs Go templates and no Jinja. Most chat templates say no more than this:

    head | opens system closes   user   { answer user }   prompt

with some text between the turns. So a few conversations are rendered by the model's own template,
the texts between the turns are read off, and what they predict for other conversations is compared
with what the template says. Where one differs, there is no Go template, and nobody gets a wrong
one. Left out are tools, thoughts, and the trimming of a turn's ends, which Go templates cannot do.

Sources: https://pkg.go.dev/text/template; Ollama's template/template.go for the variables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halfbyte.errors import HalfbyteError

Turns = Sequence[tuple[str, str]]
"""(role, content) of each turn; a system message, if there is one, is the first."""
Render = Callable[[Turns], str]
"""Turns that end with a user -> the prompt, without BOS, up to where the answer begins."""

SYSTEM, USERS, ANSWERS = "halfbyteS", ("halfbyteU0", "halfbyteU1"), ("halfbyteA0",)
# What the Go template is tried on: turns that are long, empty, and full of marks.
TRIALS = (
    ("Hi", "Hello! How are you?", "Fine.\n\nAnd you?", "Well, {{ thanks }}.", "Bye"),
    ("a", "b", "c", "d", "e", "f", "g"),
    ("<b>'quoted' \"text\"</b>", "# 1\n- 2", "\u4e2d\u6587 \U0001f600"),
    ("One turn.",),
)
SYSTEMS = (None, "You answer\nin rhymes.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """The texts between the turns. `head`: before the first user without a system message;
    `opens` and `closes`: around that message, up to the first user; `answer` and `user`: before
    those turns; `prompt`: where the next answer begins."""

    head: str
    opens: str
    closes: str
    answer: str
    user: str
    prompt: str

    def render(self, turns: Turns) -> str:
        """The prompt of a conversation that ends with a user; what the Go template makes."""
        system = turns[0][1] if turns[0][0] == "system" else None
        users = turns if system is None else turns[1:]
        parts = [self.head if system is None else self.opens + system + self.closes]
        for index, (role, content) in enumerate(users):
            between = self.answer if role == "assistant" else self.user
            parts += [content] if index == 0 else [between, content]
        return "".join([*parts, self.prompt])

    def go(self) -> str:
        """The Go template. An answer that comes last is left open, to be continued."""
        first = _if(
            "$.System",
            f"{_text(self.opens)}{{{{ $.System }}}}{_text(self.closes)}",
            _text(self.head),
        )
        user = _if("$first", f"{first}{{{{ $first = false }}}}", _text(self.user))
        return (
            '{{ $first := true }}{{ $last := "" }}'
            "{{ range .Messages }}"
            f'{{{{ if eq .Role "user" }}}}{user}{{{{ .Content }}}}{{{{ $last = .Role }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{_text(self.answer)}{{{{ .Content }}}}'
            "{{ $last = .Role }}"
            "{{ end }}{{ end }}"
            f'{{{{ if ne $last "assistant" }}}}{_text(self.prompt)}{{{{ end }}}}'
        )


def learned(render: Render) -> Dialogue | None:
    """What a model's chat template says between turns; None where it says more than that."""
    try:
        dialogue = _read_off(render)
        proved = dialogue is not None and all(
            dialogue.render(turns) == render(turns) for turns in _trials()
        )
    except HalfbyteError:
        return None  # it refuses a conversation that Ollama would hand to it
    return dialogue if proved else None


def _read_off(render: Render) -> Dialogue | None:
    plain = [("user", USERS[0]), ("assistant", ANSWERS[0]), ("user", USERS[1])]
    found = _cut(render(plain), (USERS[0], ANSWERS[0], USERS[1]))
    instructed = _cut(render([("system", SYSTEM), *plain]), (SYSTEM, USERS[0]))
    if found is None or instructed is None:
        return None
    head, answer, user, prompt = found
    opens, closes, _ = instructed
    return Dialogue(head=head, opens=opens, closes=closes, answer=answer, user=user, prompt=prompt)


def _cut(text: str, marks: Sequence[str]) -> list[str] | None:
    """The texts around the marks, which must be there in this order."""
    parts: list[str] = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _trials() -> list[Turns]:
    roles = ("user", "assistant")
    return [
        ([] if system is None else [("system", system)])
        + [(roles[index % 2], content) for index, content in enumerate(trial)]
        for trial in TRIALS
        for system in SYSTEMS
    ]


def _text(text: str) -> str:
    """An action that prints a text, whatever is in it."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _if(condition: str, then: str, otherwise: str) -> str:
    return f"{{{{ if {condition} }}}}{then}{{{{ else }}}}{otherwise}{{{{ end }}}}"
