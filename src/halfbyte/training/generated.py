"""What the original says itself, as something to learn from: drawn from its own predictions.

Some begin from nothing, the others answer prompts. The same seed gives the same tokens, whatever
runs beside them, and a stopped run finds what it had said (`kept`).
Idea: Liu et al. 2023, "LLM-QAT: data-free quantization aware training".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from halfbyte.engine.engine import Engine
from halfbyte.formats.atomic import atomic_file
from halfbyte.formats.progress import Progress
from halfbyte.models.decoder import Decoder
from halfbyte.specs import Request, SamplingParams

AT_ONCE = 16  # sequences in a forward
GROUP = 64  # sequences between two looks at the clock

Said = list[tuple[list[int], list[int]]]


def generated(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    longest: int,
    stop_ids: frozenset[int],
    closing: Sequence[int],
    seed: int,
    progress: Progress | None = None,
) -> Said:
    """(prompt, what was said to it) of every prompt, at a temperature of 1.

    Both together are up to `longest` tokens; prompts that leave no room are left out. `closing` is
    put behind what came to its end.
    """
    fitting = [prompt for prompt in prompts if len(prompt) < longest]
    engine = Engine(decoder, context=min(longest, decoder.spec.context), max_sequences=AT_ONCE)
    found: Said = []
    for start in range(0, len(fitting), GROUP):
        group = fitting[start : start + GROUP]
        requests = [
            Request(
                prompt_ids=tuple(prompt),
                sampling=SamplingParams(seed=seed),
                max_tokens=longest - len(prompt),
                stop_ids=stop_ids if len(prompt) > 1 else frozenset(),
                sequence=start + index,
            )
            for index, prompt in enumerate(group)
        ]
        for prompt, answer in zip(group, engine.generate(requests), strict=True):
            ended = closing if answer.finish_reason == "stop" else ()
            found.append(([*prompt], [*answer.token_ids, *ended]))
        if progress is not None:
            progress(len(found), len(fitting))
    engine.close()
    return found


def save(path: Path, said: Said) -> None:
    data = json.dumps(said).encode()
    with atomic_file(path, size=len(data)) as file:
        file.write(data)


def restore(path: Path) -> Said:
    return [(prompt, answer) for prompt, answer in json.loads(path.read_text(encoding="utf-8"))]
