"""A conversation in token ids: rendering it, where an answer stops, and what in it was thought.

The seam to know about: the rendered template is encoded with special tokens parsed, as everywhere
in the field, so text of a user or system message that spells a control token ("<turn|>") becomes
that token. A message cannot reach more than the model's own turn structure (nothing here runs
tools), but whoever relays untrusted text decides here whether to filter it first.

Source: Gemma 4's prompt format (thoughts between <|channel> and <channel|>).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError, UnsupportedError
from halfbyte.text.answer import THOUGHT_CLOSES, THOUGHT_OPENS
from halfbyte.text.assets import TextAssets
from halfbyte.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from halfbyte.text.template import ChatTemplate

_PROBE = "halfbyteprobe"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says, and what it thought before; "" for nothing."""

    text: str
    thought: str


class Chat:
    """The chat side of one model."""

    def __init__(self, tokenizer: Tokenizer, assets: TextAssets) -> None:
        self._tokenizer = tokenizer
        self._assets = assets

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        think: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt's ids, with exactly one BOS where the model uses one.

        `think` sets the template's enable_thinking (None: the template's own default). Raises
        UnsupportedError for a model without a template, and what `ChatTemplate` raises.
        """
        prompt = self._prompt(
            messages, think=think, tools=tools, add_generation_prompt=add_generation_prompt
        )
        return self._tokenizer.with_bos(self._tokenizer.encode(prompt, special=True))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the files' and the one that closes a turn in the template."""
        closing = self._closing_id()
        found = frozenset(self._assets.generation.eos_ids)
        return found if closing is None else found | {closing}

    def split(self, ids: Sequence[int]) -> Answer:
        """Divide an answer's ids into text and thought.

        A channel that is not closed is thought to the end. One that the prompt has opened shows
        only its end; all before that is thought.
        """
        opens = self._tokenizer.token_id(THOUGHT_OPENS)
        closes = self._tokenizer.token_id(THOUGHT_CLOSES)
        said: list[int] = []
        thoughts: list[list[int]] = []
        inside = False
        for token_id in ids:
            if token_id == opens:
                thoughts.append([])
                inside = True
            elif token_id == closes:
                if not inside and not thoughts:
                    thoughts.append(said)
                    said = []
                inside = False
            else:
                (thoughts[-1] if inside else said).append(token_id)
        thought = "\n".join(filter(None, map(self._thought, thoughts)))
        return Answer(text=self._tokenizer.decode(said), thought=thought)

    def _thought(self, ids: list[int]) -> str:
        # A channel begins with its name on a line of its own.
        return self._tokenizer.decode(ids).removeprefix("thought").strip()

    def _closing_id(self) -> int | None:
        """The special token that the template puts after an answer; None if it puts none."""
        messages = [
            {"role": "user", "content": _PROBE},
            {"role": "assistant", "content": _PROBE},
        ]
        try:
            prompt = self._prompt(messages, add_generation_prompt=False)
        except HalfbyteError:
            return None
        tail = prompt.rpartition(_PROBE)[2].lstrip()
        first = self._tokenizer.encode(tail, special=True)[:1]
        return first[0] if first and self._tokenizer.is_special(first[0]) else None

    def _prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        think: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool,
    ) -> str:
        return self._template.render(
            messages,
            bos=self._assets.token(self._assets.bos_id),
            eos=self._assets.token(self._assets.eos_id),
            tools=tools,
            enable_thinking=think,
            add_generation_prompt=add_generation_prompt,
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        from halfbyte.text.template import ChatTemplate

        if self._assets.template is None:
            raise UnsupportedError(
                "the model has no chat template",
                hint="use --raw to continue a text without one",
            )
        return ChatTemplate(self._assets.template)
