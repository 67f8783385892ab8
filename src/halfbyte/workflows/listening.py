"""What a target says, collected: answers to prompts and beginnings, and the texts themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte import env
from halfbyte.errors import InvalidInputError
from halfbyte.formats.manifest import weights_hash
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.kernels.choice import choose
from halfbyte.models.load import load
from halfbyte.quantizer.opening import open_source
from halfbyte.specs import AUTO
from halfbyte.text.assets import TextAssets
from halfbyte.training.passages import TOGETHER, Author, Library, Passage, advised

SHORTEST = 3  # tokens of an answer that drafts can be learned from


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """What a drafter is taught on: files, so many tokens of what the target says and of texts, in
    windows of up to `window` tokens and answers of up to `longest`."""

    files: Sequence[Path]
    tokens: int = 400_000
    window: int = 512
    longest: int = 192
    seed: int = 0


class Listening:
    """A target as it is stored, and the lessons that are made of what it says."""

    def __init__(
        self,
        model: str,
        lessons: Lessons,
        *,
        device: str = AUTO,
        threads: int | None = None,
    ) -> None:
        self.place = locate(model)
        self.source = open_source(str(self.place))
        self.lessons, self.device, self.threads = lessons, device, threads
        if lessons.window > self.source.spec.context:
            raise InvalidInputError(
                f"is beyond the context of {self.source.spec.context} tokens", where="--window"
            )
        self.library = Library(self._assets, window=lessons.window, seed=lessons.seed)

    @property
    def _assets(self) -> TextAssets:
        if self.source.assets is None:
            raise InvalidInputError("has no tokenizer to read texts with", where=self.place)
        return self.source.assets

    @property
    def files(self) -> dict[str, str]:
        """Name -> sha256 of the files."""
        return {path.name: _sha256(path) for path in self.lessons.files}

    def passages(self, progress: Progress | None) -> list[Passage]:
        """What is learned from: texts, and what the target says, in equal shares of the files."""
        lessons, found = self.lessons, list[Passage]()
        ops = choose(self.source.spec, self.device, threads=self.threads)
        author = Author(
            load(self.source, ops),
            sampling=advised(self._assets, seed=lessons.seed),
            library=self.library,
            longest=lessons.longest,
            folder=self._answers(),
        )
        each = lessons.tokens // len(lessons.files)
        for number, path in enumerate(lessons.files):
            wanted, texts = each, [*_up_to(self.library.texts(path), each // 2)]
            wanted -= sum(text.learned for text in texts)
            answers = author.answers(
                self.library.prompts(path),
                f"{path.name}-{_sha256(path)[:12]}",
                wanted,
                _part(progress, number, len(lessons.files)),
            )
            found += [*texts, *(it for it in answers if it.learned >= SHORTEST)]
        return found

    def _answers(self) -> Path:
        """Where the target's answers are kept, for other drafters too."""
        lessons = self.lessons
        facts = [weights_hash(self.place), lessons.window, lessons.longest, lessons.seed, TOGETHER]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        folder = env.cache_dir() / "answers" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _up_to(passages: Iterator[Passage], tokens: int) -> Iterator[Passage]:
    """The first of the passages, with so many tokens to learn, about."""
    while tokens > 0 and (passage := next(passages, None)) is not None:
        tokens -= passage.learned
        yield passage


def _part(progress: Progress | None, number: int, count: int) -> Progress | None:
    """The progress of one of several parts of equal size."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
