"""One linear layer with correlated inputs: what every method leaves of its output error.

    PYTHONPATH=src python bench/ptq_layer.py --seeds 3
    PYTHONPATH=src python bench/ptq_layer.py --schemes q4_0,int4-g128 --methods rtn,gptq

The weights are normal. The inputs have the two features of activations that matter: channels of
very different size (log-normal), and correlations (192 factors that all channels share). Methods
see the second moment of 16,384 inputs; the error is measured with that of 8,192 others, relative to
the output, in percent. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import mean, stdev
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.numerics.codec import decode, encode
from halfbyte.quantizer import awq, gptq, signround
from halfbyte.specs import Scheme, scheme_of

FACTORS, SHARED, SPREAD = 192, 0.6, 0.95


class Layer(NamedTuple):
    """A weight [N, K] and the second moments [K, K] of inputs to learn from and of others."""

    weight: Tensor
    hessian: Tensor
    unseen: Tensor

    def error(self, stored: Tensor) -> float:
        """The output error on unseen inputs, in percent of the output."""
        difference = stored - self.weight
        left = ((difference @ self.unseen) * difference).sum()
        return float(100 * left / ((self.weight @ self.unseen) * self.weight).sum())


def layer(seed: int, *, outputs: int = 512, inputs: int = 1024) -> Layer:
    chance = torch.Generator().manual_seed(seed)
    ranks = (torch.arange(inputs) + 0.5) / inputs
    size = (SPREAD * torch.special.ndtri(ranks)).exp()[torch.randperm(inputs, generator=chance)]
    mixing = torch.randn(FACTORS, inputs, generator=chance) / FACTORS**0.5

    def moment(tokens: int) -> Tensor:
        factors = torch.randn(tokens, FACTORS, generator=chance) @ mixing
        own = torch.randn(tokens, inputs, generator=chance)
        x = (SHARED**0.5 * factors + (1 - SHARED) ** 0.5 * own) * size
        return x.T @ x / tokens

    hessian, unseen = moment(16384), moment(8192)
    return Layer(0.02 * torch.randn(outputs, inputs, generator=chance), hessian, unseen)


def weighted(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    return decode(encode(weight, scheme, method="search", importance=hessian.diagonal()))


def scaled(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    factors = awq.channel_scales([weight], hessian, scheme)
    inner = hessian / (factors * factors[:, None])
    return weighted(weight * factors, inner, scheme) / factors


METHODS: dict[str, Callable[[Tensor, Tensor, Scheme], Tensor]] = {
    "rtn": lambda w, h, s: decode(encode(w, s)),
    "search": lambda w, h, s: decode(encode(w, s, method="search")),
    "weighted": weighted,
    "awq": scaled,
    "signround": lambda w, h, s: decode(signround.solve(w, h, s)),
    "gptq-plain": lambda w, h, s: decode(gptq.solve(w, h, s, act_order=False, refit=False)),
    "gptq-ordered": lambda w, h, s: decode(gptq.solve(w, h, s, refit=False)),
    "gptq": lambda w, h, s: decode(gptq.solve(w, h, s)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", default="q4_0")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layers = [layer(seed) for seed in range(arguments.seeds)]
    table: dict[str, dict[str, list[float]]] = {}
    for scheme in arguments.schemes.split(","):
        table[scheme] = {}
        for method in arguments.methods.split(","):
            started = perf_counter()
            errors = [
                made.error(METHODS[method](made.weight, made.hessian, scheme_of(scheme)))
                for made in layers
            ]
            seconds = (perf_counter() - started) / len(layers)
            table[scheme][method] = errors
            spread = stdev(errors) if len(errors) > 1 else 0.0
            print(f"{scheme:10} {method:12} {mean(errors):.4f} +- {spread:.4f} %   {seconds:.2f} s")
    print(json.dumps({"percent": table}))


if __name__ == "__main__":
    main()
