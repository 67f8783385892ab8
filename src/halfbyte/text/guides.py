"""What an answer may not do: think for ever, go in circles, or leave the structure asked for.

A guide sees the ids of an answer and says which may come next (`specs.Guide`). It is a function of
those ids alone, so an answer that is guided is the same alone and in a batch, drafted or not:

    * a thought that has used up its budget, or goes in circles, is closed, and the model answers;
    * what is said ends when it goes in circles;
    * a structure holds for what is said, from its first token on; a thought before it is free.

What it is not: a judge of content. An answer in which nothing of this happens is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.specs import common
from halfbyte.text.loops import circling
from halfbyte.text.structure import Structure, all_but, only
from halfbyte.text.tokenizer import Tokenizer

THOUGHT_SPAN = 256


# The ids that a mark in letters may be spread over.
_TAIL = 16


@dataclass(frozen=True, slots=True)
class Sign:
    """A mark around a thought: its ids, and its letters where these are no token, so that they
    count however they come."""

    ids: tuple[int, ...] = ()
    letters: str = ""
    tokenizer: Tokenizer | None = None

    def ends(self, ids: list[int]) -> bool:
        """Whether it is the last that was written."""
        if self.tokenizer is not None:
            tail = self.tokenizer.decode(ids[-_TAIL:], skip_special=False)
            return tail.rstrip().endswith(self.letters)
        return bool(self.ids) and tuple(ids[-len(self.ids) :]) == self.ids


def sign(tokenizer: Tokenizer, mark: str) -> Sign:
    """A mark in a vocabulary."""
    token = tokenizer.token_id(mark)
    if token is not None:
        return Sign((token,))
    return Sign(tuple(tokenizer.encode(mark, special=False)), mark, tokenizer)


NO_SIGN = Sign()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """`opens` and `closes`: the marks around a thought, empty for a model that does not think.

    `thinking`: the prompt has opened a thought. `budget`: ids that a thought may take; None: any
    number. `breaks_circles`: as above. `may_think`: a structured answer may begin with a thought,
    but not end in it.
    """

    opens: Sign = NO_SIGN
    closes: Sign = NO_SIGN
    thinking: bool = False
    budget: int | None = None
    breaks_circles: bool = True
    may_think: bool = True
    stop_ids: tuple[int, ...] = ()
    vocab: int = 0


@dataclass(frozen=True, slots=True)
class _State:
    """After some ids: whether this is a thought, where it began, and what must come next."""

    thinking: bool
    since: int
    forced: tuple[int, ...] = ()


class AnswerGuide:
    """Guides one answer. `structure`: of what is said."""

    def __init__(self, rules: Rules, structure: Structure | None = None) -> None:
        self._rules = rules
        self._structure = structure
        self._ids: list[int] = []
        self._states = [self._judged(_State(rules.thinking, 0), [])]

    def allowed(self, chosen: Sequence[int]) -> bytes | None:
        """See `specs.Guide`."""
        ids = list(chosen)
        same = common(self._ids, ids)
        del self._states[same + 1 :]
        self._ids = ids[:same]
        for token in ids[same:]:
            self._ids.append(token)
            self._states.append(self._after(self._states[-1], token))
        state = self._states[-1]
        if state.forced:
            return only(state.forced[:1])
        if self._structure is None:
            return None
        if state.thinking:
            return all_but(self._rules.stop_ids, self._rules.vocab)
        return self._structured(ids[state.since :])

    def _structured(self, said: list[int]) -> bytes | None:
        assert self._structure is not None
        mask = self._structure.allowed(said)
        opens = self._rules.opens.ids
        first = len(self._ids) == 0 and len(opens) == 1 and self._rules.may_think
        return _either(mask, only(opens)) if mask is not None and first else mask

    def _after(self, state: _State, token: int) -> _State:
        """The state after one more id, which is the last of `_ids`."""
        rules, ids, count = self._rules, self._ids, len(self._ids)
        if state.thinking and rules.closes.ends(ids):
            return _State(False, count)
        if not state.thinking and rules.opens.ends(ids):
            return self._judged(_State(True, count), ids)
        if state.forced:
            went_on = token == state.forced[0]
            return _State(state.thinking, state.since, state.forced[1:] if went_on else ())
        return self._judged(state, ids)

    def _judged(self, state: _State, ids: list[int]) -> _State:
        """The state, with what must come next where the rules say so."""
        rules, length = self._rules, len(ids) - state.since
        if not state.thinking:
            circles = rules.breaks_circles and circling(ids[state.since :])
            return _State(False, state.since, rules.stop_ids[:1]) if circles else state
        over = rules.budget is not None and length >= rules.budget
        circles = rules.breaks_circles and circling(ids[state.since :], THOUGHT_SPAN)
        return _State(True, state.since, rules.closes.ids) if over or circles else state


def _either(one: bytes, other: bytes) -> bytes:
    size = max(len(one), len(other))
    joined = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return joined.to_bytes(size, "little")
