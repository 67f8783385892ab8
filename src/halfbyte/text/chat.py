"""A conversation in token ids: rendering it, where an answer stops, and how it is divided.

The seam to know about: the rendered template is encoded with special tokens parsed, as everywhere
in the field, so text of a user or system message that spells a control token ("<turn|>") becomes
that token. A message cannot reach more than the model's own turn structure (nothing here runs
tools), but whoever relays untrusted text decides here whether to filter it first.

There are no built-in templates: a vocabulary tells the turn tokens, not whether the model was ever
tuned on them, and a base model given a chat prompt answers with plausible nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError, UnsupportedError
from halfbyte.text.answer import Answer, AnswerStream, collected, opens_thought
from halfbyte.text.assets import TextAssets
from halfbyte.text.grammar import Grammar, grammar_of
from halfbyte.text.guides import NO_SIGN, AnswerGuide, Rules, sign
from halfbyte.text.messages import prepared
from halfbyte.text.structure import Structure, Structures
from halfbyte.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from halfbyte.text.template import ChatTemplate

_PROBE = "halfbyteprobe"
# An answer that may not even be so long is not divided into thought and speech.
SHORT_ROOM = 64


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

        `think` sets the template's enable_thinking (None: the template's own default), `tools` are
        function declarations in JSON schema. Raises UnsupportedError for a model without a
        template, or for tools that the template has no place for, and what `ChatTemplate` and
        `prepared` raise.
        """
        if tools and not self._template.names("tools"):
            raise UnsupportedError(
                "the model's chat template has no place for tools",
                hint="describe them in the system message, or choose a model made for tools",
            )
        prompt = self._prompt(
            messages, think=think, tools=tools, add_generation_prompt=add_generation_prompt
        )
        return self._tokenizer.with_bos(self._tokenizer.encode(prompt, special=True))

    @property
    def can_think(self) -> bool:
        """Whether the template lets a caller turn thinking on and off."""
        return self._assets.template is not None and self._template.names("enable_thinking")

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the files' own, the one that closes a turn in the template,
        and the one by which the model asks for a tool's result."""
        dialect = self.grammar.dialect
        handing_over = dialect and dialect.hands_over and self._special_id(dialect.hands_over)
        found = {*self._assets.generation.eos_ids, self.closing_id, handing_over}
        return frozenset(token_id for token_id in found if isinstance(token_id, int))

    @cached_property
    def closing(self) -> str:
        """What the template puts after an answer; "" for nothing, or for one that does not say."""
        messages = [
            {"role": "user", "content": _PROBE},
            {"role": "assistant", "content": _PROBE},
        ]
        try:
            prompt = self._prompt(messages, add_generation_prompt=False)
        except HalfbyteError:
            return ""
        return prompt.rpartition(_PROBE)[2].strip()

    @cached_property
    def closing_id(self) -> int | None:
        """The special token that the template puts after an answer; None if it puts none."""
        first = self._tokenizer.encode(self.closing, special=True)[:1]
        return first[0] if first and self._tokenizer.is_special(first[0]) else None

    @cached_property
    def writes_bos(self) -> bool | None:
        """Whether the template itself begins a prompt with BOS; None without one that renders."""
        try:
            prompt = self._prompt([{"role": "user", "content": _PROBE}], add_generation_prompt=True)
        except HalfbyteError:
            return None
        first = self._tokenizer.encode(prompt, special=True)[:1]
        return bool(first) and first[0] == self._assets.bos_id

    @cached_property
    def grammar(self) -> Grammar:
        """The marks around thoughts and calls."""
        return grammar_of(self._tokenizer, self._assets.template)

    def stream(
        self, prompt_ids: Sequence[int] = (), *, continues_text: bool = False, tools: bool = False
    ) -> AnswerStream:
        """What divides the answer to a prompt while it comes."""
        return AnswerStream(
            self._tokenizer, self.grammar, prompt_ids, continues_text=continues_text, tools=tools
        )

    @cached_property
    def structures(self) -> Structures:
        """Makes structures that an answer must have."""
        return Structures(self._tokenizer, self.stop_ids)

    def guide(
        self,
        prompt_ids: Sequence[int],
        *,
        room: int,
        thought_budget: int | None = None,
        breaks_circles: bool = True,
        structure: Structure | None = None,
        may_think: bool = True,
    ) -> AnswerGuide | None:
        """What an answer of up to `room` ids may not do; None where nothing is forbidden.

        A thought may take `thought_budget` ids; where that is not said and circles are broken, most
        of the room, so that there is always an answer.
        """
        if thought_budget is None and breaks_circles and room >= SHORT_ROOM:
            thought_budget = room * 3 // 4
        thoughts = self.grammar.thoughts
        if structure is None and not breaks_circles and (thoughts is None or not thought_budget):
            return None
        rules = Rules(
            opens=NO_SIGN if thoughts is None else sign(self._tokenizer, thoughts.opens),
            closes=NO_SIGN if thoughts is None else sign(self._tokenizer, thoughts.closes),
            thinking=opens_thought(self._tokenizer, self.grammar, prompt_ids),
            budget=thought_budget,
            breaks_circles=breaks_circles,
            may_think=may_think,
            stop_ids=tuple(sorted(self.stop_ids)),
            vocab=self._tokenizer.vocab_size,
        )
        return AnswerGuide(rules, structure)

    def split(
        self, ids: Sequence[int], prompt_ids: Sequence[int] = (), *, tools: bool = False
    ) -> Answer:
        """Divide a whole answer, as `stream` does."""
        stream = self.stream(prompt_ids, tools=tools)
        pieces = [piece for token_id in ids for piece in stream.push(token_id)]
        return collected([*pieces, *stream.finish()])

    def _special_id(self, string: str) -> int | None:
        found = self._tokenizer.token_id(string)
        return found if found is not None and self._tokenizer.is_special(found) else None

    def _prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        think: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool,
    ) -> str:
        return self._template.render(
            prepared(messages),
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
                hint="--raw continues a text without one; --template FILE gives one of your own",
            )
        return ChatTemplate(self._assets.template)
