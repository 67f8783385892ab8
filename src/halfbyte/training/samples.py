"""What is learned from: texts and conversations as windows of token ids, and how much each counts.

A `.jsonl` file holds conversations, in the model's own template: answers count whole, prompts by
a share, and thoughts that are empty not at all, since nobody thought them. Any other file is plain
text and counts whole. Passages and conversations are shuffled by the seed, put one after the other
and cut into windows of `length + 1` tokens, the BOS in front: a row predicts the token after it.
Files give equal shares; one that has less gives all it has, and the others more.

What it is not: a guard against measuring on what was learned; `Reader.refuse` of the calibration
windows is, and these are windows like those.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import InvalidInputError
from halfbyte.formats.conversations import Message, messages_of
from halfbyte.formats.documents import content_of
from halfbyte.formats.lines import Line, read_lines
from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.grammar import Thoughts
from halfbyte.text.overlap import fingerprint
from halfbyte.text.tokenizer import Tokenizer

CONVERSATIONS = (".jsonl", ".jsonl.gz")
PASSAGE = 4096  # characters of a passage of a text


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How windows are drawn: `count` of them at most, of `length` rows, by `seed`; rows that
    predict a token of a prompt count `prompts`."""

    count: int
    length: int = 256
    seed: int = 0
    prompts: float = 0.3


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive tokens, without BOS, and how much each counts as a prediction."""

    token_ids: Sequence[int]
    weights: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Windows of token ids [n, length + 1], and how much each row of them counts, [n, length].

    `supervised` [n] is the share of what the windows themselves say next in the loss.
    """

    token_ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    supervised: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def length(self) -> int:
        return self.weights.shape[1]

    def inputs(self, index: Sequence[int]) -> list[list[int]]:
        """What a model reads of some windows: all but the last token."""
        return self.token_ids[list(index), :-1].tolist()

    def split(self, held: int) -> tuple[Samples, Samples]:
        """All but some evenly spread windows, and these."""
        chosen = np.linspace(0, len(self) - 1, held).astype(int)
        return self._of(np.setdiff1d(np.arange(len(self)), chosen)), self._of(chosen)

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """All windows of some, one after the other; of one length."""
        return Samples(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            weights=np.concatenate([part.weights for part in parts]),
            supervised=np.concatenate([part.supervised for part in parts]),
        )

    def facts(self, files: Mapping[str, str], mix: Mix) -> dict[str, Any]:
        """What a manifest says of them."""
        return {
            "files": dict(files),
            "windows": len(self),
            "window": self.length,
            "seed": mix.seed,
            "prompts": mix.prompts,
            "fingerprint": fingerprint(self.token_ids.tolist()),
        }

    def _of(self, index: NDArray[np.intp]) -> Samples:
        return Samples(
            token_ids=self.token_ids[index],
            weights=self.weights[index],
            supervised=self.supervised[index],
        )


class SampleReader:
    """Reads files with one model's tokenizer and template. `too_long` counts, by file, the
    conversations so far that end before an answer whose prompt fills a window."""

    def __init__(self, assets: TextAssets) -> None:
        self.too_long: Counter[str] = Counter()
        self._tokenizer = Tokenizer(assets)
        self._chat = None if assets.template is None else Chat(self._tokenizer, assets)

    def read(
        self,
        paths: Sequence[Path],
        mix: Mix,
        own: Sequence[Passage] | None = None,
        *,
        supervised: float = 0.0,
    ) -> Samples:
        """The windows of the files, and of passages of the model's own.

        Raises `InvalidInputError` for files that do not fill a single window, and conversations
        of which no prompt leaves room for an answer.
        """
        shuffles = [np.random.default_rng([mix.seed, index]) for index in range(len(paths) + 1)]
        sources = [
            self.passages(path, mix, chance) for path, chance in zip(paths, shuffles, strict=False)
        ]
        if own is not None:
            order = shuffles[-1].permutation(len(own))
            sources.append(own[index] for index in order)
        bos = self.beginning
        found = _shared_out([_cut(source, mix.length, bos) for source in sources], mix.count)
        if not found:
            raise InvalidInputError(
                f"do not fill a window of {mix.length} tokens",
                where=", ".join(path.name for path in paths) or "the data",
                hint="name more text with --data, or a smaller --window",
            )
        order = np.random.default_rng([mix.seed, len(sources)]).permutation(len(found))
        return Samples(
            token_ids=np.array([found[i][0] for i in order], dtype=np.int64),
            weights=np.array([found[i][1] for i in order], dtype=np.float32),
            supervised=np.full(len(found), supervised, dtype=np.float32),
        )

    def passages(self, path: Path, mix: Mix, chance: np.random.Generator) -> Iterator[Passage]:
        """The passages of a file, shuffled."""
        if path.name.endswith(CONVERSATIONS):
            yield from self._conversations(path, mix, chance)
            return
        text = content_of(path)
        starts = range(0, len(text), PASSAGE)
        for index in chance.permutation(len(starts)):
            ids = self._tokenizer.encode(text[starts[index] :][:PASSAGE], special=False)
            yield Passage(ids, [1.0] * len(ids))

    def prompts(self, path: Path, count: int, seed: int) -> list[list[int]]:
        """The prompts of up to `count` conversations, up to where the first answer begins."""
        lines, chat = read_lines(path), self._chat_of(path)
        order = np.random.default_rng(seed).permutation(len(lines))[:count]
        asked = (_question(messages_of(lines[index])) for index in order)
        return [chat.render(messages) for messages in asked if messages]

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset[int]() if self._chat is None else self._chat.stop_ids

    @property
    def closing(self) -> list[int]:
        """The token that ends a turn, if there is one."""
        closing = None if self._chat is None else self._chat.closing_id
        return [] if closing is None else [closing]

    @property
    def beginning(self) -> list[int]:
        """What every text begins with: [BOS], or nothing."""
        return self._tokenizer.with_bos([])

    def answered(self, prompt: Sequence[int], answer: Sequence[int], share: float) -> Passage:
        """A prompt of ids and what was said to it."""
        given = prompt[len(self.beginning) :]
        ids = [*given, *answer]
        return Passage(ids, [share] * len(given) + [1.0] * len(answer))

    def _conversations(
        self, path: Path, mix: Mix, chance: np.random.Generator
    ) -> Iterator[Passage]:
        lines, empty = read_lines(path), True
        for index in chance.permutation(len(lines)):
            for passage in self._conversation(lines[index], mix, path):
                empty = False
                yield passage
        if empty and not self.too_long[path.name]:
            raise InvalidInputError("holds no answers to learn from", where=path)
        if empty:
            raise InvalidInputError(
                f"no prompt leaves room for an answer in {mix.length} tokens",
                where=path,
                hint="a larger --window",
            )

    def _conversation(self, line: Line, mix: Mix, path: Path) -> Iterator[Passage]:
        """A conversation as one passage; as one for each answer where a prompt does not go on from
        the tokens of the answer before it, as the template or the tokenizer has it."""
        chat, messages = self._chat_of(path), messages_of(line)
        skipped = len(self.beginning)
        ids: list[int] = []
        weights: list[float] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or not isinstance(message["content"], str):
                continue
            prompt = chat.render(messages[:index])[skipped:]
            if len(prompt) >= mix.length:
                self.too_long[path.name] += 1
                break
            if prompt[: len(ids)] != ids:
                yield Passage(ids, weights)
                ids, weights = [], []
            weights += [mix.prompts] * (len(prompt) - len(ids))
            answer, counts = self._answer(message["content"], chat)
            ids, weights = [*prompt, *answer], [*weights, *counts]
        if ids:
            yield Passage(ids, weights)

    def _answer(self, text: str, chat: Chat) -> tuple[list[int], list[float]]:
        """An answer with the token that closes a turn; an empty thought at its head counts 0."""
        thought, said = _without_empty_thought(text, chat.grammar.thoughts)
        before = self._tokenizer.encode(thought, special=True) if thought else []
        after = self._tokenizer.encode(said, special=False)
        ids = [*before, *after, *self.closing]
        return ids, [0.0] * len(before) + [1.0] * (len(ids) - len(before))

    def _chat_of(self, path: Path) -> Chat:
        if self._chat is None:
            raise InvalidInputError(
                "holds conversations, and the model has no chat template",
                where=path,
                hint="name plain text, or a model that was tuned to chat",
            )
        return self._chat


def hashes(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files, by name."""
    found: dict[str, str] = {}
    for path in paths:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _question(messages: Sequence[Message]) -> Sequence[Message]:
    """What stands before the first answer."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[0]] if answers else messages


def _without_empty_thought(text: str, marks: Thoughts | None) -> tuple[str, str]:
    """An empty thought that an answer begins with, or "", and the rest."""
    if marks is None or not text.lstrip().startswith(marks.opens):
        return "", text
    thought, closes, said = text.partition(marks.closes)
    inside = thought.lstrip().removeprefix(marks.opens).strip().removeprefix(marks.heading)
    if not closes or inside.strip():
        return "", text
    return thought + closes, said


Cut = tuple[list[int], list[float]]


def _cut(passages: Iterator[Passage], length: int, bos: Sequence[int]) -> Iterator[Cut]:
    """Windows of `length + 1` tokens and `length` weights; a rest that fills none is left out."""
    step = length + 1 - len(bos)
    ids: list[int] = []
    weights: list[float] = []
    for passage in passages:
        ids += passage.token_ids
        weights += passage.weights
        while len(ids) >= step:
            counts = weights[:step] if bos else weights[1:step]
            if any(counts):
                yield [*bos, *ids[:step]], counts
            ids, weights = ids[step:], weights[step:]


def _shared_out(sources: Sequence[Iterator[Cut]], count: int) -> list[Cut]:
    """Windows of all sources in turn, until there are enough or they have no more."""
    found: list[Cut] = []
    left = [*sources]
    while left and len(found) < count:
        for source in [*left]:
            window = next(source, None)
            if window is None:
                left.remove(source)
            elif len(found) < count:
                found.append(window)
    return found
