"""What the doctor knows of a model: a snapshot, plain values, from its headers and small files.

Unlike `formats.checkpoint.read` it is made of a checkpoint that cannot be read, too: what reading
said is one of the facts. Only hashing, and telling a drafter's target, look at the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from halfbyte.specs import ModelSpec

# unasked: nobody hashed, and nothing was found without
Integrity = Literal["whole", "altered", "unknown", "unasked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why something was refused, and the knob."""

    what: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The text side. Stops are token strings by id.

    `says_bos`: whether the files say that a text begins with BOS, None where they are silent;
    `adds_bos`: whether halfbyte puts one; `needs_bos`: vocabularies of this kind want one.
    `template_bos`: whether the template writes one itself, None without a template that renders.
    `stated_stops` are those of the files, `template_stops` those that the template shows.
    `closing` is what the template puts after an answer, `closing_is_token` whether that is one
    control token. `marks` are the control tokens that divide an answer: thoughts, calls, quotes.
    """

    kind: str
    bos: str | None
    says_bos: bool | None
    adds_bos: bool
    needs_bos: bool
    template_bos: bool | None = None
    stated_stops: Mapping[int, str] = field(default_factory=dict[int, str])
    template_stops: Mapping[int, str] = field(default_factory=dict[int, str])
    closing: str = ""
    closing_is_token: bool = True
    marks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafter:
    """The drafter that lies beside a model; `made_for` and `target` are fingerprints."""

    name: str
    spec: ModelSpec | None
    refusal: Refusal | None = None
    made_for: str | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A checkpoint. `config` is config.json, `metadata` the short values of a GGUF; one is empty.

    `stored`: how many matrices are stored in each scheme, by what files say; `packed` how many
    parts of other packages' packed matrices there are, and `packing` the package that the config
    names. `lacks`: what it needs that the native kernels do not have. `context` and `draft` are
    what somebody wants of it, None and 0 where nobody said.
    """

    name: str
    spec: ModelSpec | None = None
    refusal: Refusal | None = None
    integrity: Integrity = "unknown"
    integrity_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: tuple[str, ...] = ()
    stored: Mapping[str, int] = field(default_factory=dict[str, int])
    packed: int = 0
    packing: str | None = None
    text: Text | None = None
    text_refusal: Refusal | None = None
    drafter: Drafter | None = None
    lacks: str | None = None
    context: int | None = None
    draft: int = 0
