"""What quantization-aware training brings, mode by mode, beside round-to-nearest and YAQA.

    python bench/qat.py MODEL --data books.txt --data chats.jsonl --own 200k \
        --held-out held-out.txt --held-out chats-held-out.jsonl --modes full scales --seeds 1

Every row is measured on every held-out text against MODEL: KL in nats per token, and what is lost
of the perplexity. `closed` is the share of YAQA's KL that is gone, `cut` the share of
round-to-nearest's loss of perplexity. Files stay in --folder; what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic, process_time
from typing import Any

from halfbyte import workflows
from halfbyte.cli.values import length
from halfbyte.evals.fidelity import Fidelity
from halfbyte.evals.texts import Reading
from halfbyte.quantizer.calibrate import Sampling
from halfbyte.specs import LoadOptions
from halfbyte.training.modes import MODES, Rates
from halfbyte.training.samples import Mix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--held-out", type=Path, action="append", required=True)
    parser.add_argument("--own", type=length, default=0, help="tokens of the model's own")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["full"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--scale-rate", type=float)
    parser.add_argument("--samples", type=int, default=512, help="windows that are calibrated on")
    parser.add_argument("--recipe", default="q4_0")
    parser.add_argument("--windows", type=int, default=32, help="measured of each text, of 512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("qat-bench"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = [_rounded(arguments), _calibrated(arguments)]
    for mode in arguments.modes:
        for seed in range(arguments.seeds):
            rows.append(_trained(arguments, mode, seed))
            _show(rows)


Row = dict[str, Any]


def _rounded(arguments: argparse.Namespace) -> Row:
    path = arguments.folder / "rtn.gguf"
    if not path.exists():
        workflows.quantize(arguments.model, path, recipe=arguments.recipe, method="rtn")
    return {"name": "rtn", "texts": _measured(path, arguments)}


def _calibrated(arguments: argparse.Namespace) -> Row:
    path = arguments.folder / "yaqa.gguf"
    if not path.exists():
        calibrating = workflows.Calibrating(
            files=arguments.data,
            sampling=Sampling(samples=arguments.samples, window=arguments.window),
            held_out=arguments.held_out,
            threads=arguments.threads,
        )
        workflows.quantize(
            arguments.model, path, recipe=arguments.recipe, method="yaqa", calibrating=calibrating
        )
    return {"name": "yaqa", "texts": _measured(path, arguments)}


def _measured(path: Path, arguments: argparse.Namespace) -> list[Fidelity]:
    options = LoadOptions(threads=arguments.threads)
    evaluation = workflows.Evaluation(str(path), against=arguments.model, options=options)
    texts = {text.name: text for text in arguments.held_out}
    return [*evaluation.measure(texts, Reading(max_windows=arguments.windows)).texts]


def _trained(arguments: argparse.Namespace, mode: Any, seed: int) -> Row:
    target = arguments.folder / f"{mode}-{seed}.gguf"
    kept = target.with_suffix(".json")
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    held = 16
    asked = workflows.Distilling(
        data=arguments.data,
        held_out=arguments.held_out,
        max_windows=arguments.windows,
        own_tokens=arguments.own,
        mix=Mix(count=arguments.steps * arguments.batch + held, length=arguments.window, seed=seed),
        held=held,
        mode=mode,
        steps=arguments.steps,
        batch=arguments.batch,
        at_once=arguments.batch,
        rates=Rates.given(places=arguments.rate, scales=arguments.scale_rate),
        again=False,
        recipe=arguments.recipe,
        start=arguments.folder / "yaqa.gguf",
        seed=seed,
        threads=arguments.threads,
    )
    began, used = monotonic(), process_time()
    told = workflows.distill(arguments.model, target, asked, tell=lambda *_: lambda _: None)
    row: Row = {
        "name": f"{mode}, seed {seed}",
        "texts": [asdict(text) for text in told.after],
        "seconds": monotonic() - began,
        "processor_seconds": process_time() - used,
        "peak_bytes": told.peak_bytes,
        "planned_bytes": told.planned_bytes,
    }
    kept.write_text(json.dumps(row), encoding="utf-8")
    return row


def _show(rows: Sequence[Row]) -> None:
    rtn, best = (_numbers(row) for row in rows[:2])
    for row in rows:
        parts: list[str] = []
        for name, (kl, lost) in _numbers(row).items():
            closed, cut = 1 - kl / best[name][0], 1 - lost / rtn[name][1]
            parts.append(f"{name} {kl:.5f} ({closed:+.0%} closed) {lost:+.2%} ({cut:+.0%} cut)")
        took = f"{row['processor_seconds']:.0f} s of processors" if "seconds" in row else ""
        print(f"{row['name']:18} {' | '.join(parts)} {took}", flush=True)


def _numbers(row: Row) -> Mapping[str, tuple[float, float]]:
    """Text -> KL, and what is lost of the perplexity."""
    texts = [t if isinstance(t, dict) else asdict(t) for t in row["texts"]]
    return {t["name"]: (t["kl"]["mean"], t["perplexity_ratio"] - 1) for t in texts}


if __name__ == "__main__":
    main()
