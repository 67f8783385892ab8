"""The Modelfile of an Ollama folder: where the weights are, the template, stops and sampling.

Ollama adds BOS itself, as the GGUF says; the template goes without. It knows stops from the GGUF,
but not all that a model has, so each is named.

Source: https://github.com/ollama/ollama, docs/modelfile.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.errors import UnsupportedError
from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.go_template import Dialogue, Turns, learned
from halfbyte.text.template import ChatTemplate
from halfbyte.text.tokenizer import Tokenizer

NAME = "Modelfile"
# Ours (SamplingParams), Ollama's.
PARAMETERS = (
    ("temperature", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("repetition_penalty", "repeat_penalty"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelfile:
    """Its text, and what a person should know who uses it."""

    text: str
    notes: tuple[str, ...]


def modelfile(assets: TextAssets | None, weights: str) -> Modelfile:
    """The Modelfile for a GGUF of that name beside it.

    Raises `UnsupportedError` for a model without a tokenizer, which Ollama cannot run.
    """
    if assets is None:
        raise UnsupportedError("Ollama runs no model without a tokenizer")
    template, notes = _template(assets)
    stops = sorted(assets.token(index) for index in Chat(Tokenizer(assets), assets).stop_ids)
    lines = [f"FROM ./{weights}", template]
    lines += [f"PARAMETER {theirs} {value:g}" for theirs, value in _sampling(assets)]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return Modelfile(text="\n".join(line for line in lines if line) + "\n", notes=notes)


def _sampling(assets: TextAssets) -> list[tuple[str, float]]:
    values = ((theirs, getattr(assets.generation, ours)) for ours, theirs in PARAMETERS)
    return [(theirs, value) for theirs, value in values if value is not None]


def _template(assets: TextAssets) -> tuple[str, tuple[str, ...]]:
    """The TEMPLATE instruction, and what to say of it."""
    if assets.template is None:
        return 'TEMPLATE "{{ .Prompt }}"', ("the model has no chat template: it continues texts",)
    dialogue = _dialogue(assets, assets.template)
    if dialogue is None:
        note = (
            "the chat template says more than Ollama's can, so none is written: "
            "Ollama guesses one from the GGUF"
        )
        return "", (note,)
    note = "the template has the turns and the system message, without tools and thoughts"
    return f'TEMPLATE """{dialogue.go()}"""', (note,)


def _dialogue(assets: TextAssets, source: str) -> Dialogue | None:
    """What the template says, if that is all and does not change with the day."""
    template = ChatTemplate(source)
    bos, eos = assets.token(assets.bos_id), assets.token(assets.eos_id)

    def render(turns: Turns) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return template.render(messages, bos=bos, eos=eos).removeprefix(bos)

    return None if template.names("strftime_now") else learned(render)
