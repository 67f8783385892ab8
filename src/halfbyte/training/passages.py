"""What a drafter is taught on: passages of text, and what its target says itself.

A drafter must know what its target says, so most of what it learns from are the target's own
answers: to the prompts of conversations, and to beginnings of texts, half of them greedy and half
sampled as the model's makers advise. They are made once and kept, a piece at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.engine import Engine
from halfbyte.errors import InvalidInputError
from halfbyte.formats.atomic import write_file
from halfbyte.formats.conversations import messages_of
from halfbyte.formats.documents import content_of
from halfbyte.formats.lines import read_lines
from halfbyte.formats.progress import Progress
from halfbyte.models.decoder import Decoder
from halfbyte.specs import Request, SamplingParams
from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer

CONVERSATIONS = (".jsonl", ".jsonl.gz")
TOGETHER = 32  # answers that are generated at once, and kept in one file
BEGINNING = 32  # tokens of a text that the target continues
CHARACTERS = 16  # of a text for every token wanted of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Token ids, of which the `first` and later are learned; `greedy`: as the target says them."""

    ids: tuple[int, ...]
    first: int
    greedy: bool = False

    @property
    def learned(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the target is to go on from."""

    ids: tuple[int, ...]
    greedy: bool


def advised(assets: TextAssets, *, seed: int) -> SamplingParams:
    """Sampling as the model's makers advise."""
    own = assets.generation
    return SamplingParams(
        temperature=own.temperature or 1.0,
        top_k=own.top_k or 0,
        top_p=own.top_p or 1.0,
        min_p=own.min_p or 0.0,
        seed=seed,
        suppress=frozenset(own.suppress_ids),
    )


class Library:
    """Reads files with the tokenizer and the template of a model."""

    def __init__(self, assets: TextAssets, *, window: int, seed: int) -> None:
        self._tokenizer = Tokenizer(assets)
        self._chat = Chat(self._tokenizer, assets) if assets.template is not None else None
        self.window, self._seed = window, seed

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset() if self._chat is None else self._chat.stop_ids

    @property
    def closing(self) -> tuple[int, ...]:
        """The id that ends an answer, if there is one."""
        closing = None if self._chat is None else self._chat.closing_id
        return (*sorted(self.stop_ids)[:1],) if closing is None else (closing,)

    def prompts(self, path: Path) -> Iterator[Prompt]:
        """What a file has to go on from, in an order drawn by the seed; every other is greedy."""
        found = self._questions(path) if _chats(path) else self._beginnings(path)
        for number, ids in enumerate(found):
            yield Prompt(ids=tuple(ids), greedy=number % 2 == 0)

    def texts(self, path: Path) -> Iterator[Passage]:
        """The windows of a text, in an order drawn by the seed; conversations have none."""
        if _chats(path):
            return
        bos = self._tokenizer.with_bos([])
        for ids in self._pieces(path, self.window - len(bos), seed=self._seed + 1):
            yield Passage(ids=(*bos, *ids), first=1)

    def _questions(self, path: Path) -> Iterator[list[int]]:
        """The prompts of a file of conversations that leave half of a window for the answer."""
        if self._chat is None:
            raise InvalidInputError(
                "the model has no chat template to read conversations with", where=path
            )
        lines = read_lines(path)
        for index in np.random.default_rng(self._seed).permutation(len(lines)):
            messages = messages_of(lines[index])
            asked = max(
                (i + 1 for i, message in enumerate(messages) if message["role"] == "user"),
                default=0,
            )
            if not asked:
                raise lines[index].wrong("asks nothing: no message of a user")
            ids = self._chat.render(messages[:asked])
            if len(ids) <= self.window // 2:
                yield ids

    def _beginnings(self, path: Path) -> Iterator[list[int]]:
        for ids in self._pieces(path, BEGINNING, seed=self._seed):
            yield self._tokenizer.with_bos(ids)

    def _pieces(self, path: Path, count: int, *, seed: int) -> Iterator[list[int]]:
        """Pieces of `count` tokens of a text, from all over it."""
        text = content_of(path)
        starts = range(0, len(text), CHARACTERS * count)
        for index in np.random.default_rng(seed).permutation(len(starts)):
            passage = text[starts[index] : starts[index] + CHARACTERS * count]
            ids = self._tokenizer.encode(passage, special=False)
            for start in range(0, len(ids) - count + 1, count):
                yield ids[start : start + count]


class Author:
    """Makes the target say how prompts go on, and keeps it in `folder`, some answers to a file."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        sampling: SamplingParams,
        library: Library,
        longest: int,
        folder: Path,
    ) -> None:
        self._decoder, self._sampling = decoder, sampling
        self._stop_ids, self._closing = library.stop_ids, library.closing
        self._window, self._longest, self._folder = library.window, longest, folder

    def answers(
        self, prompts: Iterator[Prompt], name: str, wanted: int, progress: Progress | None
    ) -> list[Passage]:
        """Passages with `wanted` tokens of answers to some of the prompts, or to all of them."""
        found: list[Passage] = []
        done = 0
        while done < wanted:
            some = [prompt for prompt, _ in zip(prompts, range(TOGETHER), strict=False)]
            if not some:
                break
            number = len(found) // TOGETHER
            found += self._kept(self._folder / f"{name}-{number:05}.json", some, number)
            done = sum(passage.learned for passage in found)
            if progress is not None:
                progress(min(done, wanted), wanted)
        return found

    def _kept(self, place: Path, prompts: Sequence[Prompt], number: int) -> list[Passage]:
        if not place.exists():
            text = json.dumps(self._said(prompts, number)).encode()
            write_file(place, text)
        answers: list[list[int]] = json.loads(place.read_text(encoding="utf-8"))
        return [
            Passage(ids=(*prompt.ids, *answer), first=len(prompt.ids), greedy=prompt.greedy)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _said(self, prompts: Sequence[Prompt], number: int) -> list[list[int]]:
        """The answers, each with the id that ends one where it came to an end."""
        requests = [
            Request(
                prompt_ids=prompt.ids,
                sampling=SamplingParams(temperature=0) if prompt.greedy else self._sampling,
                max_tokens=min(self._longest, self._window - len(prompt.ids)),
                stop_ids=self._stop_ids,
                sequence=number * TOGETHER + index,
            )
            for index, prompt in enumerate(prompts)
        ]
        engine = Engine(self._decoder, context=self._window, max_sequences=len(prompts))
        done = engine.generate(requests)
        engine.close()
        return [
            [*it.token_ids, *(self._closing if it.finish_reason == "stop" else ())] for it in done
        ]


def _chats(path: Path) -> bool:
    return path.name.endswith(CONVERSATIONS)
