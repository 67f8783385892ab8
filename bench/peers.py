"""The same GGUF in halfbyte and in llama.cpp, in turn, in one run: A B A B, medians and ratios.

    pip install -e '.[peers]'
    python bench/peers.py model.gguf --threads 2 --rounds 3 --depth 4096

Each round starts a process of its own for each side. Both feed fixed tokens and sample nothing:
prefill@N is one prompt of N tokens in chunks of 512, decode@D one token at a time behind D others,
rows@8 eight tokens at once with all their logits. llama.cpp runs with its defaults (f16 cache,
flash attention where it chooses so). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

CHUNK = 512
SIDES = ("halfbyte", "llama.cpp")
Forward = Callable[[int, int, bool], None]
"""(position, number of tokens, logits of all rows or of the last) -> runs them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--depth", type=int, default=0, help="also decode behind so many tokens")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[side].append(json.loads(output.splitlines()[-1]))
    report(results)


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """A table of medians, and of the median of the ratios round by round."""
    rows: dict[str, dict[str, float]] = {}
    ours, theirs = (results[side] for side in SIDES)
    for name in ours[0]:
        ratios = [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]
        rows[name] = {
            "halfbyte": median(result[name] for result in ours),
            "llama.cpp": median(result[name] for result in theirs),
            "ratio": median(ratios),
        }
        print(
            f"{name:18} " + "  ".join(f"{key} {value:10.4g}" for key, value in rows[name].items())
        )
    print(json.dumps({"schema": "halfbyte.peers/1", "rounds": len(ours), "rows": rows}))


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of every test, seconds of 8 rows over 1, and bytes, on one side."""
    context = max(arguments.prefill, arguments.depth) + arguments.decode + 16
    start = perf_counter()
    forward = (halfbyte if arguments.side == "halfbyte" else llama_cpp)(arguments, context)
    forward(0, 1, False)
    found = {"first_token_s": perf_counter() - start}
    fill(forward, arguments.prefill)
    seconds = median(timed(lambda: fill(forward, arguments.prefill)) for _ in range(3))
    found[f"prefill@{arguments.prefill}"] = arguments.prefill / seconds
    for depth in (0, arguments.depth) if arguments.depth else (0,):
        fill(forward, depth)
        each = [timed(lambda at=depth + i: forward(at, 1, False)) for i in range(arguments.decode)]
        found[f"decode@{depth}"] = 1 / median(each)
    eight = median(timed(lambda: forward(8, 8, True)) for _ in range(9))
    one = median(timed(lambda: forward(8, 1, True)) for _ in range(9))
    found["rows@8 / rows@1"] = eight / one
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return found


def timed(run: Callable[[], None]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def fill(forward: Forward, count: int) -> None:
    """Puts `count` tokens into an empty cache, in chunks."""
    for start in range(0, count, CHUNK):
        forward(start, min(CHUNK, count - start), False)


def token(position: int) -> int:
    return 5 + position * 7919 % 4000


def halfbyte(arguments: argparse.Namespace, context: int) -> Forward:
    from halfbyte.formats.checkpoint import read
    from halfbyte.kernels.cpu import CPUOps
    from halfbyte.models.cache import CacheShape, Slot
    from halfbyte.models.decoder import Chunk
    from halfbyte.models.load import load

    decoder = load(read(arguments.model), CPUOps(threads=arguments.threads))
    pages = -(-context // 64)
    cache = decoder.new_cache(CacheShape(pages=pages, ring_slack=CHUNK))
    slot = Slot(pages=list(range(pages)))

    def forward(position: int, count: int, every: bool) -> None:
        slot.length = slot.written = position
        ids = [token(position + i) for i in range(count)]
        wanted = "all" if every else "last"
        decoder.forward([Chunk(slot=slot, token_ids=ids, wanted=wanted)], cache)

    return forward


def llama_cpp(arguments: argparse.Namespace, context: int) -> Forward:
    import llama_cpp.llama_cpp as c

    silent = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(silent, ctypes.c_void_p(0))
    model = c.llama_model_load_from_file(
        str(arguments.model).encode(), c.llama_model_default_params()
    )
    parameters = c.llama_context_default_params()
    parameters.n_ctx = context
    parameters.n_batch = parameters.n_ubatch = CHUNK
    parameters.n_threads = parameters.n_threads_batch = arguments.threads
    state = c.llama_init_from_model(model, parameters)
    batch = c.llama_batch_init(CHUNK, 0, 1)

    def forward(position: int, count: int, every: bool) -> None:
        c.llama_memory_seq_rm(c.llama_get_memory(state), 0, position, -1)
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i] = token(position + i), position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == count - 1
        if c.llama_decode(state, batch) != 0:
            raise RuntimeError("llama.cpp cannot decode")
        c.llama_get_logits(state)
        forward.keep = silent  # type: ignore[attr-defined]

    return forward


if __name__ == "__main__":
    main()
