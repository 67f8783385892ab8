"""The proof that speculation changes no token, on a model as it would run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.errors import InvalidInputError
from halfbyte.evals.losslessness import SAMPLINGS, Ids, Trial, prove
from halfbyte.evals.texts import OWN_TEXTS, read_text
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.kernels.choice import choose
from halfbyte.models.load import load, load_drafter
from halfbyte.quantizer.opening import open_drafter, open_source
from halfbyte.specs import LoadOptions
from halfbyte.text.tokenizer import Tokenizer

PROMPTS = 8
LONGEST_PROMPT = 48
# Drafters that are tried on every model; its own comes on top.
DRAFTERS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The trials, in the op set of that name."""

    ops: str
    trials: Sequence[Trial]

    @property
    def tokens(self) -> int:
        return sum(trial.tokens for trial in self.trials)

    @property
    def differing(self) -> int:
        return sum(trial.differing for trial in self.trials)


def prove_speculation(
    model: str, *, tokens: int, options: LoadOptions, progress: Progress | None = None
) -> Proof:
    """Compare at least so many tokens, over all drafters and ways to sample."""
    place = locate(model, progress)
    source = open_source(str(place), recipe=options.recipe, method=options.method)
    ops = choose(source.spec, options.device, options.dtype, threads=options.threads)
    decoder = load(source, ops)
    found = open_drafter(options.drafter, source, place, recipe=options.recipe)
    each = -(-tokens // (DRAFTERS * len(SAMPLINGS) * PROMPTS))
    if each + LONGEST_PROMPT > source.spec.context:
        raise InvalidInputError(
            f"{each} tokens a prompt do not fit {source.spec.context} positions"
        )
    trials = prove(
        decoder,
        None if found is None else load_drafter(found, decoder),
        _prompts(source),
        tokens=each,
        kv=options.kv,
        progress=progress,
    )
    return Proof(ops=ops.name, trials=trials)


def _prompts(source: Source) -> list[Ids]:
    """Beginnings of our texts, of several lengths; of random ids where there is no tokenizer."""
    lengths = [1 + index * (LONGEST_PROMPT - 1) // (PROMPTS - 1) for index in range(PROMPTS)]
    if source.assets is None:
        random = np.random.default_rng(0)
        return [tuple(random.integers(0, source.spec.vocab, n).tolist()) for n in lengths]
    tokenizer = Tokenizer(source.assets)
    texts = [read_text(OWN_TEXTS[name], tokenizer) for name in ("english", "code")]
    return [
        (*texts[index % 2].bos, *texts[index % 2].token_ids[50 * index :])[:length]
        for index, length in enumerate(lengths)
    ]
