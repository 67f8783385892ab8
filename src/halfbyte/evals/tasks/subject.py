"""A model that is put to a task: its decoder, and what makes ids of questions and text of answers.

Everything is greedy, so a task is a function of the model. The model and its reference get the
tokenizer and the template of the reference, and so the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.engine.engine import Engine
from halfbyte.engine.sequence import Completion
from halfbyte.evals.tasks.likelihood import Likelihood
from halfbyte.models.decoder import Decoder
from halfbyte.specs import KVType, Request, SamplingParams
from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer

AT_ONCE = 4  # sequences that are generated together


class Subject:
    """A decoder with text assets. `tokenizer` and `chat` are those of the assets."""

    def __init__(self, decoder: Decoder, assets: TextAssets, kv: KVType) -> None:
        self.tokenizer = Tokenizer(assets)
        self.chat = Chat(self.tokenizer, assets)
        self.has_template = assets.template is not None
        self.context = decoder.spec.context
        self._decoder = decoder
        self._kv: KVType = kv
        self._suppressed = frozenset(assets.generation.suppress_ids)

    def prompt(self, question: str) -> list[int]:
        """A question as a chat's, or as text to continue for a model without a template."""
        if self.has_template:
            return self.chat.render([{"role": "user", "content": question}])
        return self.tokenizer.encode_raw(question, special=False)

    def split(self, context: str, continuation: str) -> Split:
        """A text in two parts as ids, and where the second begins.

        That is where the ids of the whole part from those of the context alone: a token across the
        seam belongs to the second part.
        """
        alone, whole = (
            self.tokenizer.encode_raw(text, special=False)
            for text in (context, context + continuation)
        )
        pairs = enumerate(zip(alone, whole, strict=False))
        seam = next((i for i, (a, b) in pairs if a != b), min(len(alone), len(whole) - 1))
        return Split(whole, max(seam, 1))

    def likelihood(self, longest: int) -> Likelihood:
        """What asks the decoder about sequences of up to so many tokens."""
        return Likelihood(self._decoder, longest, self._kv)

    def complete(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Completion]:
        """Greedy completions, each to a stop, to `max_tokens` or to the end of the context."""
        longest = max(map(len, prompts)) + max_tokens
        engine = Engine(
            self._decoder,
            context=min(longest, self.context),
            max_sequences=min(AT_ONCE, len(prompts)),
            kv=self._kv,
        )
        sampling = SamplingParams(temperature=0.0, suppress=self._suppressed)
        requests = [
            Request(
                prompt_ids=tuple(prompt),
                sampling=sampling,
                max_tokens=max_tokens,
                stop_ids=self.chat.stop_ids,
            )
            for prompt in prompts
        ]
        return engine.generate(requests)

    def text(self, completion: Completion, prompt: Sequence[int]) -> str:
        """What an answer says, its thoughts left out."""
        return self.chat.split(completion.token_ids, prompt).text


@dataclass(frozen=True, slots=True)
class Split:
    """A sequence, and where its ending starts."""

    ids: Sequence[int]
    start: int
