"""What a card does with Gemma 4 12B in Q4_0: bytes, time and memory, in a few minutes.

    python bench/gpu.py                          # every section; random weights, nothing to fetch
    python bench/gpu.py --sections speed,memory --layers 12
    python bench/gpu.py --sections peers --model ./a-checkpoint

Sections: `card` (copy bandwidth, bf16 peak), `bits` (a row alone, beside seven, in a prompt),
`speed` (decoding, 8 rows, prompts), `drafts` (rounds at given rates), `memory` (12B at 32k filled
under a cap of 12 GB), `peers` (Transformers in bf16 and NF4 on a checkpoint; for llama.cpp there is
bench/peers.py, on a GGUF).
Each line is one JSON object with what was measured; a section that fails says so and the next one
runs. Weights are drawn, not read (bench/random_model.py): bytes and times are those of any weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import torch
from random_model import RandomModel, read_config

from halfbyte.evals.bench import CHUNK, run, step_bytes, token, trial_of
from halfbyte.evals.speculation import speculate
from halfbyte.families import spec_of
from halfbyte.kernels.contract import Draw
from halfbyte.kernels.triton import TritonOps
from halfbyte.kernels.triton.device import Device
from halfbyte.models.cache import Slot, shape_for
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load, load_drafter
from halfbyte.specs import SamplingParams, recipe_of

GREEDY = SamplingParams(temperature=0)
PEAK_SIZE, PEAK_ROUNDS = 8192, 10
CAP_BYTES = 12 * 10**9
LONG = 32768
RATES = (0.85, 0.72, 0.61, 0.52)


@dataclass
class Bench:
    """What the sections share: the model is drawn once."""

    model: str
    layers: int | None

    @cached_property
    def source(self) -> RandomModel:
        return RandomModel(spec_of(read_config(self.model, self.layers)), recipe_of("q4_0"))

    @cached_property
    def decoder(self) -> Decoder:
        return load(self.source, TritonOps(Device("cuda")))

    @cached_property
    def bandwidth(self) -> float:
        measured = Device("cuda").read_bandwidth()
        assert measured is not None
        return measured

    @cached_property
    def peak(self) -> float:
        """bf16 operations per second of the library's own product."""
        a = torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda", dtype=torch.bfloat16)
        best = min(_seconds(lambda: a @ a) for _ in range(PEAK_ROUNDS))
        return 2 * PEAK_SIZE**3 / best

    @property
    def multiplied(self) -> int:
        """Weights that every row of a prompt is multiplied with: the head sees only the last."""
        return sum(
            tensor.count
            for tensor in self.source.spec.tensors()
            if len(tensor.shape) > 1 and not tensor.name.endswith("embed.weight")
        )


class Course:
    """A decoder with one sequence, whose tokens are chosen on the card."""

    chunk = CHUNK

    def __init__(self, decoder: Decoder, length: int) -> None:
        self._decoder = decoder
        shape = shape_for(context=length, sequences=1, rows=CHUNK, kind="bf16")
        self._cache = decoder.new_cache(shape)
        self._cache.prepare(CHUNK, 16, 1)
        self._pages = list(range(shape.pages))

    def forward(self, position: int, count: int, *, every: bool) -> None:
        slot = Slot(pages=self._pages, length=position, written=position)
        ids = [token(position + i, self._decoder.spec.vocab) for i in range(count)]
        chunk = Chunk(slot=slot, token_ids=ids, wanted="all" if every else "last")
        draws = [
            Draw(sampling=GREEDY, sequence=0, position=position + i)
            for i in range(count if every else 1)
        ]
        assert self._decoder.choose([chunk], self._cache, draws, states=False) is not None


def card(bench: Bench) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    return {
        "name": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "copy_bytes_per_s": bench.bandwidth,
        "bf16_ops_per_s": bench.peak,
    }


def bits(bench: Bench) -> dict[str, Any]:
    """Whether a row has the same logits alone, beside seven others, and in a prompt."""
    ids = [token(i, bench.source.spec.vocab) for i in range(72)]

    def logits(sizes: Sequence[int]) -> np.ndarray:
        cache = bench.decoder.new_cache(shape_for(context=128, sequences=1, rows=128, kind="bf16"))
        slot, parts = Slot(pages=[0, 1]), []
        for size in sizes:
            chunk = Chunk(slot=slot, token_ids=ids[slot.length : slot.length + size], wanted="all")
            parts.append(bench.decoder.forward([chunk], cache).copy())
        return np.concatenate(parts)[-8:]

    alone = logits([64, *[1] * 8])
    return {
        "eight_equal_one": bool(np.array_equal(logits([64, 8]), alone)),
        "prompt_equals_one": bool(np.array_equal(logits([72]), alone)),
    }


def speed(bench: Bench) -> dict[str, Any]:
    names = ["prefill@512", "prefill@2048", "decode@0", "decode@4096", *rows_named(1, 2, 4, 8, 16)]
    course = Course(bench.decoder, 4096 + 256)
    rows = run(course, [trial_of(name) for name in names], decode=64, repeats=5)
    seconds = {row.test: row.median_s for row in rows}
    needed = step_bytes(bench.source)
    operations = 2 * bench.multiplied * 2048
    return {
        "seconds": seconds,
        "decode_tokens_per_s": 1 / seconds["decode@0"],
        "decode_share_of_copy": needed / seconds["decode@0"] / bench.bandwidth,
        "eight_rows_of_one": seconds["rows@8"] / seconds["rows@1"],
        "prefill_share_of_bf16": operations / seconds["prefill@2048"] / bench.peak,
    }


def rows_named(*counts: int) -> list[str]:
    return [f"rows@{count}" for count in counts]


def drafts(bench: Bench) -> dict[str, Any]:
    """Tokens per second with a drafter whose drafts are right at given rates, over plain ones."""
    config = read_config(f"{bench.model}-assistant")
    drafter = load_drafter(RandomModel(spec_of(config), recipe_of("q4_0")), bench.decoder)
    plain = run(Course(bench.decoder, 512), [trial_of("decode@0")], decode=64, repeats=1)[0]
    row = speculate(bench.decoder, drafter, RATES, depth=0, rounds=64, kv="bf16")
    return {
        "rates": RATES,
        "tokens_per_s": row.tokens_per_s,
        "over_plain": row.tokens_per_s / plain.tokens_per_s,
    }


def memory(bench: Bench) -> dict[str, Any]:
    """In a process of its own: a context of 32k filled, under a cap."""
    command = [sys.executable, __file__, "--sections", "filled", "--model", bench.model]
    layers = [] if bench.layers is None else ["--layers", str(bench.layers)]
    done = subprocess.run([*command, *layers], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def filled(bench: Bench) -> dict[str, Any]:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total))
    free = torch.cuda.mem_get_info()[0]
    course = Course(bench.decoder, LONG)
    course._cache.seed()
    course.forward(LONG - CHUNK - 1, CHUNK, every=False)
    for _ in range(3):
        course.forward(LONG - 1, 1, every=False)
    torch.cuda.synchronize()
    context = total - free
    return {
        "cap_bytes": CAP_BYTES,
        "reserved_bytes": torch.cuda.memory_reserved(),
        "used_bytes": total - torch.cuda.mem_get_info()[0],
        "before_bytes": context,
    }


def peers(bench: Bench) -> dict[str, Any]:
    """Transformers on a checkpoint of --model: seconds of a decoded token, and memory."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    found: dict[str, Any] = {"llama.cpp": "python bench/peers.py FILE.gguf with its CUDA build"}
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for name, quantized in (("bf16", None), ("nf4", four)):
        model = AutoModelForCausalLM.from_pretrained(
            bench.model, dtype=torch.bfloat16, device_map="cuda", quantization_config=quantized
        )
        ids = torch.ones((1, 8), dtype=torch.int64, device="cuda")

        def generate(count: int, model: Any = model, ids: Any = ids) -> None:
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

        generate(4)
        short, long = _seconds(lambda: generate(8)), _seconds(lambda: generate(40))
        found[name] = {
            "decode_s": (long - short) / 32,
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
        del model
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "card": card,
    "bits": bits,
    "speed": speed,
    "drafts": drafts,
    "memory": memory,
    "filled": filled,
    "peers": peers,
}


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = perf_counter()
    work()
    torch.cuda.synchronize()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="gemma4-12b", help="dimensions; for `peers` a checkpoint"
    )
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--sections", default="card,bits,speed,drafts,memory")
    given = parser.parse_args()
    bench = Bench(given.model, given.layers)
    for name in given.sections.split(","):
        start = perf_counter()
        try:
            result = SECTIONS[name](bench)
        except Exception:
            result = {"failed": traceback.format_exc()[-1500:]}
        took = {"section": name, "took_s": round(perf_counter() - start, 1)}
        print(json.dumps(took | result), flush=True)


if __name__ == "__main__":
    main()
