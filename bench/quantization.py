"""Every method on every recipe, measured on texts that no method has seen: one table.

    python bench/quantization.py MODEL --calib books.txt --calib chats.jsonl \\
        --text books=held-out.txt --text chat=other.jsonl --results tiny.jsonl
    python bench/quantization.py MODEL --own-stories 400 --results stories.jsonl

Each row is a file that was written and measured as it will run: its KL divergence from MODEL, in
nats per token, the mean over the seeds that drew the calibration windows, and the standard
deviation between them. Rows are appended to `--results` as they are found, so a run that was
stopped goes on where it was; a row is found again only where its line was deleted. With
`--own-stories` the model writes the texts itself, one half to calibrate on and one to measure on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from halfbyte import workflows
from halfbyte.evals.texts import Reading
from halfbyte.formats.checkpoint import Source, read
from halfbyte.kernels.choice import choose
from halfbyte.models.load import load
from halfbyte.quantizer.calibrate import Sampling
from halfbyte.specs import SolveMethod
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.generated import generated
from halfbyte.training.samples import SampleReader

UNCALIBRATED: tuple[SolveMethod, ...] = ("rtn", "search")
CALIBRATED: tuple[SolveMethod, ...] = ("awq", "signround", "gptq", "yaqa")
STORY = 256  # tokens of a text that the model writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all rows share."""

    model: str
    calib: Sequence[Path]
    texts: Mapping[str, Path]
    samples: int
    window: int
    reading: Reading
    results: Path

    def settings(self) -> dict[str, Any]:
        return {
            "model": Path(self.model).name,
            "calib": [path.name for path in self.calib],
            "texts": {name: path.name for name, path in self.texts.items()},
            "samples": self.samples,
            "window": self.window,
            "windows": self.reading.max_windows,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Those that were found with these settings."""
        if not self.results.exists():
            return []
        lines = self.results.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if row["settings"] == self.settings()]

    def find(self, recipe: str, method: SolveMethod, seed: int) -> dict[str, Any]:
        """One row: a file written, and measured."""
        with TemporaryDirectory() as folder:
            name = "out.gguf" if recipe.startswith("q") else "out"
            target, started = Path(folder) / name, perf_counter()
            made = workflows.quantize(
                self.model,
                target,
                recipe=recipe,
                method=method,
                calibrating=None if method in UNCALIBRATED else self._calibrating(seed),
            )
            seconds = perf_counter() - started
            texts = self.measured(str(target))
        row = {"recipe": recipe, "method": method, "seed": seed, "bytes": made.bytes}
        return {**row, "seconds": seconds, "texts": texts, "settings": self.settings()}

    def measured(self, model: str) -> dict[str, dict[str, Any]]:
        """What was found on each text."""
        evaluation = workflows.Evaluation(model, against=self.model)
        return {
            text.name: {
                "tokens": text.tokens,
                "kl": None if text.kl is None else text.kl.mean,
                "same_top1": text.same_top1,
                "perplexity_ratio": text.perplexity_ratio,
            }
            for text in evaluation.measure(self.texts, self.reading).texts
        }

    def _calibrating(self, seed: int) -> workflows.Calibrating:
        return workflows.Calibrating(
            files=self.calib,
            sampling=Sampling(samples=self.samples, window=self.window, seed=seed),
            held_out=[path for path in self.texts.values() if path.suffix != ".jsonl"],
            device="cpu",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", action="append", type=Path, default=[])
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--own-stories", type=int, metavar="N", help="the model writes the texts")
    parser.add_argument("--recipes", default="q4_0,q4_0-pure,int4-g128")
    parser.add_argument("--methods", default=",".join((*UNCALIBRATED, *CALIBRATED)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="measured of each text, of 512")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    texts = {name: Path(path) for name, path in (text.split("=") for text in arguments.text)}
    calib: list[Path] = arguments.calib
    if arguments.own_stories:
        mine, measured = stories(arguments.model, arguments.own_stories, arguments.results)
        calib, texts = [mine], {"stories": measured}
    bench = Bench(
        model=arguments.model,
        calib=calib,
        texts=texts,
        samples=arguments.samples,
        window=arguments.window,
        reading=Reading(window=512, max_windows=arguments.windows),
        results=arguments.results,
    )
    recipes, methods = arguments.recipes.split(","), arguments.methods.split(",")
    for wanted in wished(recipes, methods, arguments.seeds):
        if wanted not in [(row["recipe"], row["method"], row["seed"]) for row in bench.rows()]:
            append(bench.results, bench.find(*wanted))
    print(table(bench.rows()))


def wished(
    recipes: Sequence[str], methods: Sequence[SolveMethod], seeds: int
) -> Iterator[tuple[str, SolveMethod, int]]:
    """Recipe, method and seed of every row; without calibration there is nothing to draw."""
    for recipe, method in product(recipes, methods):
        for seed in range(1 if method in UNCALIBRATED else seeds):
            yield recipe, method, seed


def append(results: Path, row: Mapping[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    kl = ", ".join(f"{name} {text['kl']:.5f}" for name, text in row["texts"].items())
    print(f"{row['recipe']} {row['method']} {row['seed']}: {kl}", flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each recipe and method, a column for each text, and the ratio to rtn beside it."""
    texts = list(rows[0]["texts"]) if rows else []
    lines = [f"| recipe | bytes | method | {' | '.join(texts)} |", "|---" * (3 + len(texts)) + "|"]
    kinds = dict.fromkeys((row["recipe"], row["method"]) for row in rows)
    found = {kind: [r for r in rows if (r["recipe"], r["method"]) == kind] for kind in kinds}
    for (recipe, method), those in found.items():
        plain = found.get((recipe, "rtn"), [])
        cells = [cell(those, plain, text) for text in texts]
        lines.append(f"| {recipe} | {those[0]['bytes']:,} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(rows: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]], text: str) -> str:
    """Mean, spread over the seeds, and the ratio to round-to-nearest."""
    values = [row["texts"][text]["kl"] for row in rows]
    shown = f"{mean(values):.4f}"
    if len(values) > 1:
        shown += f" ± {stdev(values):.4f}"
    if plain and plain is not rows:
        shown += f" ({mean(values) / plain[0]['texts'][text]['kl']:.2f}x)"
    return shown


def stories(model: str, count: int, results: Path) -> tuple[Path, Path]:
    """Two texts that the model wrote: every second story goes to either. Written once."""
    paths = [results.with_suffix(f".{name}.txt") for name in ("calibration", "measured")]
    if not all(path.exists() for path in paths):
        told = written(read(Path(model)), count, results.with_suffix(".stories"))
        for start, path in enumerate(paths):
            path.write_text("\n\n".join(told[start::2]), encoding="utf-8")
    return paths[0], paths[1]


def written(source: Source, count: int, folder: Path) -> list[str]:
    """Texts that a model says itself; what it said lies in the folder."""
    assets = source.assets
    if assets is None:
        raise SystemExit("the model has no tokenizer to write texts with")
    folder.mkdir(parents=True, exist_ok=True)
    reader, tokenizer = SampleReader(assets), Tokenizer(assets)
    said = generated(
        lambda: load(source, choose(source.spec, "cpu")),
        [reader.beginning or [0]] * count,
        folder=folder,
        longest=STORY,
        stop_ids=reader.stop_ids,
        closing=reader.closing,
        seed=0,
    )
    return [tokenizer.decode(token_ids) for _, token_ids in said]


if __name__ == "__main__":
    main()
