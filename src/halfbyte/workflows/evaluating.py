"""Measuring a model on texts and tasks, alone or against the reference it was made from.

The reference runs first, and its final states are kept (`evals/reference.py`); then the model
runs. So memory holds one of them at a time, and a second measurement does not run the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from halfbyte.errors import InvalidInputError
from halfbyte.evals import diagnose
from halfbyte.evals.chats import read_chats
from halfbyte.evals.fidelity import Fidelity, measure
from halfbyte.evals.gate import default_gate
from halfbyte.evals.reference import Baseline, Reference
from halfbyte.evals.texts import OWN_TEXTS, Reading, Window, cut, read_text
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.lora import open_adapter
from halfbyte.formats.manifest import check_sizes, weights_hash
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.kernels.choice import choose, oracle
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load
from halfbyte.quantizer.opening import open_source
from halfbyte.specs import LoadOptions
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer

CHATS = ".jsonl"


class Trial:
    """A model opened to be measured, beside its reference if `against` names one.

    The reference is read as it is stored, and computes in f32; its tokenizer and template serve
    both. `lora`: the model with that adapter. Opening reads headers only.
    """

    def __init__(
        self,
        model: str,
        *,
        against: str | None = None,
        options: LoadOptions | None = None,
        lora: str | None = None,
    ) -> None:
        self._options = options or LoadOptions()
        self.source = open_source(model, recipe=self._options.recipe, method=self._options.method)
        self._against = None if against is None else locate(against)
        self.base = None if self._against is None else _opened(self._against)
        self._adapters = {} if lora is None else {lora: open_adapter(lora, self.source.spec)}
        assets = (self.base.assets if self.base else None) or self.source.assets
        if assets is None:
            raise InvalidInputError("neither model has a tokenizer", where=model)
        self._assets = assets

    @property
    def own_texts(self) -> dict[str, Path]:
        """Our own short texts, and the conversations among them for a model that has a template."""
        chats = self._assets.template is not None
        return {n: path for n, path in OWN_TEXTS.items() if chats or path.suffix != CHATS}

    def measure(
        self, texts: Mapping[str, Path], reading: Reading, progress: Progress | None = None
    ) -> list[Fidelity]:
        """The fidelity on texts by name; a .jsonl file holds conversations, whose answers count.

        Raises `InvalidInputError` where the texts or the two models do not fit.
        """
        windows = [self._windows(path, reading) for path in texts.values()]
        baselines = self._baselines(windows, progress)
        decoder = self._decoder
        return [
            measure(
                decoder,
                cut_,
                name=name,
                reference=baseline,
                kv=self._options.kv,
                progress=progress,
            )
            for name, cut_, baseline in zip(texts, windows, baselines, strict=True)
        ]

    def gate(self) -> dict[str, float]:
        """Thresholds for how the model is stored."""
        return default_gate(self.source.spec, self.source.schemes)

    def differences(self) -> list[str]:
        """What the two say of themselves that should be the same."""
        return [] if self.base is None else diagnose.differences(self.source, self.base)

    def likely_causes(self, measured: Sequence[Fidelity]) -> list[str]:
        """Why the model missed its gate, likeliest first; the weights are read again."""
        if self.base is None:
            return []
        return diagnose.likely_causes(self.source, self.base, measured)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._assets)

    @cached_property
    def _decoder(self) -> Decoder:
        options = self._options
        ops = choose(self.source.spec, options.device, options.dtype, threads=options.threads)
        return load(self.source, ops, adapters=self._adapters)

    def _windows(self, path: Path, reading: Reading) -> list[Window]:
        if path.suffix == CHATS:
            chat = Chat(self._tokenizer, self._assets)
            return read_chats(path, chat, self._tokenizer, reading)
        return cut(read_text(path, self._tokenizer), reading)

    def _baselines(
        self, texts: Sequence[Sequence[Window]], progress: Progress | None
    ) -> Sequence[Baseline | None]:
        if self.base is None or self._against is None:
            return [None] * len(texts)
        options = self._options
        ops = oracle(self.base.spec, options.device, threads=options.threads)
        kept = Reference(self.base, ops, weights=weights_hash(self._against))
        return kept.read(texts, progress)


def _opened(place: Path) -> Source:
    check_sizes(place)
    return read(place)
