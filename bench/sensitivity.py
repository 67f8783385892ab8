"""What Fisher's gradients predict a rounding to cost, against what it costs when it is done.

    python bench/sensitivity.py MODEL --calib texts.txt --text held-out.txt

Each group of tensors is stored in a scheme while all others stay as they are, and the KL divergence
is measured on a text that the prediction has not seen. At the end the squared correlation of the
logarithms: 1 would be an order and ratios without a flaw. In the sum over all groups stands how far
costs add up: predicted, added up as measured, and measured of all groups at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import gettempdir

import numpy as np

from halfbyte.evals.fidelity import measure
from halfbyte.evals.reference import Baseline, Reference
from halfbyte.evals.texts import Reading, Window, cut, read_text
from halfbyte.formats.checkpoint import Source, read
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.load import load
from halfbyte.numerics.codec import convert
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.calibrate import Reader, Sampling
from halfbyte.quantizer.sensitivity import priced, shared_of
from halfbyte.specs import Scheme
from halfbyte.text.tokenizer import Tokenizer


class Replaced:
    """A source of which some tensors are stored in other schemes."""

    def __init__(self, source: Source, schemes: Mapping[str, Scheme]) -> None:
        self._source = source
        self.spec, self.assets = source.spec, source.assets
        self.schemes = {**source.schemes, **schemes}

    def tensor(self, name: str) -> QTensor:
        return convert(self._source.tensor(name), self.schemes[name], method="search")

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for tensor in self.spec.tensors():
            yield tensor.name, self.tensor(tensor.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", action="append", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--schemes", default="q4_0,q6_k")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="measured of the text, of 512")
    arguments = parser.parse_args()
    model = read(arguments.model)
    assert model.assets is not None
    sampling = Sampling(samples=arguments.samples, window=arguments.window)
    windows = Reader(model.assets).read(arguments.calib, sampling).windows
    costs = priced(model, windows, Path(gettempdir()), device="cpu")
    reading = Reading(window=512, max_windows=arguments.windows)
    text = cut(read_text(arguments.text, Tokenizer(model.assets)), reading)
    [baseline] = Reference(model, ReferenceOps(exact_rows=False), weights=None).read([text])
    for scheme in arguments.schemes.split(","):
        found: list[tuple[float, float]] = []
        together: dict[str, Scheme] = {}
        for group in shared_of(model):
            schemes = group.schemes_for(scheme)
            together |= schemes
            pair = costs[group.name, scheme], divergence(Replaced(model, schemes), text, baseline)
            print(f"{scheme} {group.name:28} {pair[0]:.6f} {pair[1]:.6f}", flush=True)
            found.append(pair)
        whole = divergence(Replaced(model, together), text, baseline)
        predicted, measured = np.array(found).T
        fit = np.corrcoef(np.log(predicted), np.log(measured))[0, 1] ** 2
        print(
            f"{scheme}: R^2 {fit:.3f}; predicted {predicted.sum():.4f}, "
            f"added up {measured.sum():.4f}, together {whole:.4f}"
        )


def divergence(source: Source, text: list[Window], baseline: Baseline) -> float:
    decoder = load(source, ReferenceOps(exact_rows=False))
    kl = measure(decoder, text, name="text", reference=baseline).kl
    assert kl is not None
    return kl.mean


if __name__ == "__main__":
    main()
