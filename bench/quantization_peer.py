"""AutoRound beside our own methods: one model, the same bits, the same calibration windows.

    python -m pip install auto-round
    python bench/quantization_peer.py MODEL --calib books.txt --text books=held-out.txt

AutoRound writes its checkpoint in GPTQ's layout (symmetric integers of 4 bits, groups of 32, scales
in fp16; the embedding stays as it is), which is read and measured like any other model; ours are
stored in the same bits, `int4-g32`, but with scales in bf16. The KL divergence is from MODEL, in
nats per token.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from quantization import Bench

from halfbyte.evals.texts import Reading
from halfbyte.formats.checkpoint import read
from halfbyte.quantizer.calibrate import Reader, Sampling
from halfbyte.specs import SolveMethod

GROUP = 32
OURS: tuple[SolveMethod, ...] = ("rtn", "search", "signround", "gptq", "yaqa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", action="append", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="measured of each text, of 512")
    parser.add_argument("--steps", type=int, default=200, help="of AutoRound, for each layer")
    arguments = parser.parse_args()
    texts = {name: Path(path) for name, path in (text.split("=") for text in arguments.text)}
    bench = Bench(
        model=arguments.model,
        calib=arguments.calib,
        texts=texts,
        samples=arguments.samples,
        window=arguments.window,
        reading=Reading(window=512, max_windows=arguments.windows),
        results=Path("unused"),
    )
    print(f"| | seconds | {' | '.join(texts)} |\n|---{'|---' * (1 + len(texts))}|")
    with TemporaryDirectory() as folder:
        started = perf_counter()
        auto_round(bench, Path(folder) / "peer", arguments.steps)
        seconds = perf_counter() - started
        show("AutoRound", seconds, bench.measured(_written(Path(folder) / "peer")))
    for method in OURS:
        row = bench.find(f"int4-g{GROUP}", method, 0)
        show(method, row["seconds"], row["texts"])


def show(name: str, seconds: float, texts: Mapping[str, Mapping[str, Any]]) -> None:
    kl = " | ".join(f"{text['kl']:.4f}" for text in texts.values())
    print(f"| {name} | {seconds:.0f} | {kl} |", flush=True)


def auto_round(bench: Bench, target: Path, steps: int) -> None:
    """Its defaults, but for the bits, and on the windows that our calibration draws."""
    from auto_round import AutoRound
    from auto_round.utils import model as kinds
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    assets = read(Path(bench.model)).assets
    assert assets is not None
    sampling = Sampling(samples=bench.samples, window=bench.window, seed=0)
    windows = Reader(assets).read(bench.calib, sampling).windows
    # Only texts are calibrated on: it would ask a model with eyes or ears for its processor.
    kinds._LLM_ONLY_MODEL_TYPES.add(AutoConfig.from_pretrained(bench.model).model_type)  # pyright: ignore
    ids = [torch.tensor([window]) for window in windows]
    AutoRound(
        AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(bench.model),
        bits=4,
        group_size=GROUP,
        sym=True,
        iters=steps,
        seqlen=bench.window,
        nsamples=bench.samples,
        dataset=[{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids],
        device_map="cpu",
        enable_torch_compile=False,
    ).quantize_and_save(str(target), format="auto_gptq")


def _written(target: Path) -> str:
    """The directory that holds the checkpoint: the one given, or one inside."""
    return str(next(target.rglob("config.json")).parent)


if __name__ == "__main__":
    main()
