"""One side of bench/peers.py, in a process of its own.

Prints a line when it has its first token, and its rows as JSON. Until then nothing is imported that
the side does not need itself: the time is counted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from halfbyte.evals.bench import Course

MOST_ROWS = 2048  # that llama.cpp takes at once, by its default; it cuts them into --ubatch itself


def main() -> None:
    arguments = parsed()
    side: Side = {"halfbyte": Halfbyte, "llama.cpp": LlamaCpp}[arguments.side](arguments)
    before, start = memory("VmRSS"), perf_counter()
    course = side.load()
    course.forward(0, 1, every=False)
    facts = {"load_to_first_token_s": perf_counter() - start}
    print("the first token", flush=True)
    from halfbyte.evals.bench import run, trial_of

    trials = [trial_of(name) for name in arguments.rows.split(",")]
    rows = run(course, trials, decode=arguments.decode, repeats=arguments.repeats)
    facts["peak_bytes"] = memory("VmHWM") - before
    facts |= {row.test: row.tokens_per_s for row in rows}
    seconds = {row.test: row.median_s for row in rows if row.test.startswith("rows@")}
    one = seconds.pop("rows@1", 0.0)
    facts |= {f"{name} / rows@1": seconds[name] / one for name in seconds}
    print(json.dumps(facts | side.more()))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=["halfbyte", "llama.cpp"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", required=True)
    for name in ("context", "threads", "decode", "repeats", "ubatch", "depth"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--flash")
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--synthetic-rates", type=lambda text: [*map(float, text.split(","))])
    return parser.parse_args()


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


class Side(Protocol):
    """Made, it is imported; `load` is everything else."""

    def load(self) -> Course: ...

    def more(self) -> dict[str, float]:
        """What only this side is asked for, after the rows."""
        ...


class Halfbyte:
    def __init__(self, arguments: argparse.Namespace) -> None:
        from halfbyte.evals import bench
        from halfbyte.formats import checkpoint
        from halfbyte.kernels import cpu
        from halfbyte.models import load

        self._arguments = arguments
        self._bench, self._checkpoint, self._cpu, self._load = bench, checkpoint, cpu, load

    def load(self) -> Course:
        self._source = self._checkpoint.read(self._arguments.model)
        ops = self._cpu.CPUOps(threads=self._arguments.threads)
        self._decoder = self._load.load(self._source, ops)
        return self._bench.DecoderCourse(self._decoder, self._arguments.context)

    def more(self) -> dict[str, float]:
        facts = {
            "step_bytes": self._bench.step_bytes(self._source),
            "read_bandwidth_bytes_per_s": self._decoder.ops.read_bandwidth(),
        }
        return facts if self._arguments.drafter is None else facts | self._speculation()

    def _speculation(self) -> dict[str, float]:
        from halfbyte.evals.speculation import speculate

        arguments = self._arguments
        drafter = self._load.load_drafter(self._checkpoint.read(arguments.drafter), self._decoder)
        row = speculate(
            self._decoder,
            drafter,
            arguments.synthetic_rates,
            depth=arguments.depth,
            rounds=arguments.decode,
            repeats=arguments.repeats,
        )
        return {row.test: row.tokens_per_s}


class LlamaCpp:
    """Through the C interface of llama-cpp-python. Itself the course."""

    chunk = MOST_ROWS

    def __init__(self, arguments: argparse.Namespace) -> None:
        import llama_cpp.llama_cpp as c

        self._arguments, self._c, self._end = arguments, c, 0

    def load(self) -> Course:
        c, arguments = self._c, self._arguments
        self._silent = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._silent, ctypes.c_void_p(0))
        loading = c.llama_model_default_params()
        loading.load_mode = c.LLAMA_LOAD_MODE_MMAP
        model = c.llama_model_load_from_file(str(arguments.model).encode(), loading)
        self._vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        parameters = c.llama_context_default_params()
        parameters.n_ctx = arguments.context
        parameters.n_batch, parameters.n_ubatch = MOST_ROWS, arguments.ubatch
        parameters.n_threads = parameters.n_threads_batch = arguments.threads
        parameters.flash_attn_type = {"on": 1, "off": 0}[arguments.flash]
        parameters.swa_full = False
        self._state = c.llama_init_from_model(model, parameters)
        self._batch = c.llama_batch_init(MOST_ROWS, 0, 1)
        for i in range(MOST_ROWS):
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, 0
        return self

    def forward(self, position: int, count: int, *, every: bool) -> None:
        c, batch = self._c, self._batch
        if position < self._end:
            c.llama_memory_seq_rm(c.llama_get_memory(self._state), 0, position, -1)
        self._end = position + count
        batch.n_tokens = count
        for i in range(count):
            # The tokens of halfbyte.evals.bench.
            batch.token[i], batch.pos[i] = (position + i) * 7919 % self._vocab, position + i
            batch.logits[i] = every or i == count - 1
        if c.llama_decode(self._state, batch) != 0:
            raise RuntimeError("llama.cpp cannot decode")
        c.llama_get_logits(self._state)

    def more(self) -> dict[str, float]:
        return {}


if __name__ == "__main__":
    main()
