"""Models of random weights in the dimensions of published ones, for measuring bytes and time.

    python bench/random_model.py llama-3.2-1b random-1b.gguf                 # quantized, one file
    python bench/random_model.py gemma4-12b random-12b.gguf --recipe q8_0
    python bench/random_model.py gemma4-12b-assistant random-12b.drafter.gguf
    python bench/random_model.py gemma3-1b random-1b                         # bf16, a directory

The dimensions are those of a config.json: a name in bench/configs, or a path. `gemma4-1b` there is
no published model, it is Gemma 4's architecture in the width of Gemma 3 1B.

Quantized tensors are written as they are drawn: random codes under random scales, no checkpoint in
between, so that 12 billion weights take a minute and the memory of the largest tensor. The weights
mean nothing, but they keep activations in bounds through any number of layers: a matrix has mean 0
and variance 1 / inputs, norms lie around 1. Each tensor is a function of the seed and its name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import numpy as np

from halfbyte.cli.console import progress
from halfbyte.families import spec_of
from halfbyte.formats.checkpoint import write_gguf
from halfbyte.formats.directory import write_directory
from halfbyte.formats.finite import SCALES
from halfbyte.numerics.codec import decode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import ModelSpec, Recipe, Scheme, TensorSpec, recipe_of
from halfbyte.text.assets import TextAssets
from halfbyte.text.generation import GenerationDefaults
from halfbyte.text.vocabulary import TokenType, Vocabulary

CONFIGS = Path(__file__).parent / "configs"
SPREAD = 0.1  # of norms and other vectors
CHUNK = 1 << 24  # bytes or numbers drawn at once
SAMPLE = 4096  # blocks from which a scheme's size of weights is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a name in bench/configs, or a config.json")
    parser.add_argument("output", type=Path, help="NAME.gguf, or a directory for safetensors")
    parser.add_argument("--recipe", default="q4_0", help="of a GGUF")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", action="store_true", help="of a GGUF: tokens are numbers")
    arguments = parser.parse_args()
    config = read_config(arguments.config, arguments.layers)
    gguf = arguments.output.suffix == ".gguf"
    recipe = recipe_of(arguments.recipe if gguf else "bf16")
    spec = spec_of(config)
    assets = numbers(spec.vocab) if arguments.vocabulary else None
    model = RandomModel(spec, recipe, arguments.seed, assets)
    if gguf:
        with progress("writing", in_bytes=True) as report:
            write_gguf(model, arguments.output, progress=report)
    else:
        as_directory(model, config, arguments.output)


def read_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """A config.json by name or path, cut to `layers` if given."""
    known = CONFIGS / f"{name}.json"
    config = json.loads((known if known.exists() else Path(name)).read_text(encoding="utf-8"))
    if layers is not None:
        text = config.get("text_config", config)
        text["num_hidden_layers"] = layers
        if "layer_types" in text:
            text["layer_types"] = text["layer_types"][-layers:]
    return config


@dataclass(frozen=True)
class RandomModel:
    """A `Source` whose tensors are drawn when they are asked for."""

    spec: ModelSpec
    recipe: Recipe
    seed: int = 0
    assets: TextAssets | None = None

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        return {t.name: self.recipe.scheme_for(t.name, t.shape) for t in self.spec.tensors()}

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for tensor in self.spec.tensors():
            yield tensor.name, self._drawn(tensor)

    def tensor(self, name: str) -> QTensor:
        return self._drawn(next(t for t in self.spec.tensors() if t.name == name))

    def _drawn(self, tensor: TensorSpec) -> QTensor:
        draws = np.random.Philox(key=[self.seed, crc32(tensor.name.encode())])
        scheme, shape = self.schemes[tensor.name], tensor.shape
        if len(shape) == 1:
            return vector(draws, scheme, shape[0], self._centre(tensor.name))
        size = shape[-1] ** -0.5
        return (blocks if scheme.block > 1 else plain)(draws, scheme, shape, size)

    def _centre(self, name: str) -> float:
        """What a vector's numbers lie around. Where q and k are normed, scores have variance 1."""
        if name.endswith("bias"):
            return 0.0
        if not name.endswith("q_norm.weight"):
            return 1.0
        attention = self.spec.layers[int(name.split(".")[1])].attention
        return 1 / (attention.scale * attention.head_dim**0.5)


def numbers(count: int) -> TextAssets:
    """A vocabulary of numbers, for programs that do not start without one."""
    vocabulary = Vocabulary(
        model="llama",
        tokens=tuple(f"<{index}>" for index in range(count)),
        types=(int(TokenType.NORMAL),) * count,
        scores=(0.0,) * count,
    )
    return TextAssets(
        vocabulary=vocabulary,
        bos_id=None,
        eos_id=None,
        unk_id=None,
        pad_id=None,
        add_bos=False,
        template=None,
        generation=GenerationDefaults(),
    )


def vector(draws: np.random.Philox, scheme: Scheme, width: int, centre: float) -> QTensor:
    """Numbers around a centre."""
    drawn = np.random.Generator(draws).standard_normal(width, dtype=np.float32)
    return QTensor(scheme, (width,), _stored(centre * (1 + SPREAD * drawn), scheme)[None])


def plain(draws: np.random.Philox, scheme: Scheme, shape: tuple[int, ...], size: float) -> QTensor:
    """Normal numbers of that standard deviation, in f32, f16 or bf16."""
    data = _empty(scheme, shape)
    generator, flat = np.random.Generator(draws), data.reshape(-1)
    step = CHUNK // scheme.block_bytes * scheme.block_bytes
    for part in (flat[start : start + step] for start in range(0, len(flat), step)):
        drawn = generator.standard_normal(len(part) // scheme.block_bytes, dtype=np.float32)
        part[:] = _stored(size * drawn, scheme)
    return QTensor(scheme, shape, data)


def blocks(draws: np.random.Philox, scheme: Scheme, shape: tuple[int, ...], size: float) -> QTensor:
    """Random codes, under scales for which the weights have that root mean square."""
    data = _empty(scheme, shape)
    _draw_blocks(draws, scheme, data.reshape(-1, scheme.block_bytes), size / _unit(scheme))
    return QTensor(scheme, shape, data)


@cache
def _unit(scheme: Scheme) -> float:
    """The root mean square of weights whose scales are drawn around 1."""
    sample = np.empty((SAMPLE, scheme.block_bytes), dtype=np.uint8)
    _draw_blocks(np.random.Philox(key=0), scheme, sample, 1.0)
    return float(decode(QTensor(scheme, (SAMPLE, scheme.block), sample)).square().mean().sqrt())


def _draw_blocks(draws: np.random.Philox, scheme: Scheme, stored: np.ndarray, scale: float) -> None:
    """Fills [n, block_bytes]: scales (and minima) of either sign in 1 to 2 times `scale`."""
    _, first, last = SCALES[scheme.name]
    step = CHUNK // scheme.block_bytes
    for part in (stored[start : start + step] for start in range(0, len(stored), step)):
        words = draws.random_raw(-(-part.size // 8))
        part[:] = words.view(np.uint8)[: part.size].reshape(part.shape)
        uniform = part[:, first:last].copy().view(np.int16) / np.float32(1 << 15)
        scales = scale * (uniform + np.copysign(np.float32(1), uniform))
        part[:, first:last] = scales.astype(np.float16).view(np.uint8)


def _empty(scheme: Scheme, shape: tuple[int, ...]) -> np.ndarray:
    rows = np.prod(shape[:-1], dtype=int)
    return np.empty((rows, scheme.row_bytes(shape[-1])), dtype=np.uint8)


def _stored(values: np.ndarray, scheme: Scheme) -> np.ndarray:
    """f32 numbers as the bytes of f32, f16 or bf16 (cut off)."""
    if scheme.name == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype({"f32": np.float32, "f16": np.float16}[scheme.name]).view(np.uint8)


def as_directory(model: RandomModel, config: dict[str, Any], target: Path) -> None:
    """Writes a directory with that config.json."""
    with TemporaryDirectory() as origin:
        (Path(origin) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_directory(model, Path(origin), target)


if __name__ == "__main__":
    main()
