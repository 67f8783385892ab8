"""How long a calibrated quantization takes, and what that grows with.

    python bench/quantization_time.py gemma3-1b --samples 128 --threads 2
    python bench/quantization_time.py gemma3-1b --layers 2,4,8 --samples 16,32,64

The weights are random, in the dimensions of a name in bench/configs (`random_model.py`), and so are
the calibration tokens: what is measured is work, and it does not depend on what they say. Every
line is one run from the checkpoint to the finished GGUF. The last line of stdout is one JSON list.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from random_model import RandomModel, as_directory, read_config

from halfbyte.cli.console import progress
from halfbyte.families import spec_of
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.planner.probe import peak_bytes
from halfbyte.quantizer.calibrate import Calibration, Sampling
from halfbyte.quantizer.calibrated import calibrated
from halfbyte.specs import SolveMethod, recipe_of

TOLD = "{layers} layers, {tokens} tokens: {seconds:.1f} s, of processors {processor_seconds:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a name in bench/configs, or a config.json")
    parser.add_argument("--layers", help="fewer than the model has; several: 2,4,8")
    parser.add_argument("--samples", default="128", help="windows; several: 16,32,64")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--recipe", default="q4_0")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="for the model and all else; [a temporary one]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    depths = [int(n) for n in arguments.layers.split(",")] if arguments.layers else [None]
    rows: list[dict[str, Any]] = []
    for layers in depths:
        with TemporaryDirectory(dir=arguments.folder) as folder:
            model = Path(folder) / "model"
            config = read_config(arguments.config, layers)
            as_directory(RandomModel(spec_of(config), recipe_of("bf16"), 0), config, model)
            for samples in map(int, arguments.samples.split(",")):
                sampling = Sampling(samples=samples, window=arguments.window)
                rows.append(timed(model, sampling, arguments.recipe, arguments.method))
                print(TOLD.format(**rows[-1]), flush=True)
    print(json.dumps(rows))


def timed(model: Path, sampling: Sampling, recipe: str, method: SolveMethod) -> dict[str, Any]:
    source = read(model)
    chance = np.random.default_rng(sampling.seed)
    windows = chance.integers(0, source.spec.vocab, (sampling.samples, sampling.window)).tolist()
    calibration = Calibration(windows=windows, files={}, sampling=sampling)
    started, worked = perf_counter(), process_time()
    with (
        progress("quantizing") as report,
        calibrated(
            source,
            recipe_of(recipe),
            calibration,
            method=method,
            weights="random",
            folder=model.with_name("work"),
            progress=report,
        ) as made,
    ):
        write_gguf(made, model.with_name("out.gguf"))
    return {
        "seconds": perf_counter() - started,
        "processor_seconds": process_time() - worked,
        "layers": len(source.spec.layers),
        "parameters": source.spec.parameters,
        "tokens": sampling.samples * sampling.window,
        "threads": torch.get_num_threads(),
        "peak_bytes": peak_bytes(),
    }


if __name__ == "__main__":
    main()
