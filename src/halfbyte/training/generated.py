"""What the original says itself, as something to learn from: drawn from its own predictions.

Some begin from nothing, the others answer prompts. The same seed gives the same tokens, whatever
runs beside them. What was said lies in a folder, a file for every group of sequences, so that a run
that was stopped says only what is missing.
Idea: Liu et al. 2023, "LLM-QAT: data-free quantization aware training".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from halfbyte.engine.engine import Engine
from halfbyte.engine.sequence import Completion
from halfbyte.formats.atomic import write_file
from halfbyte.formats.progress import Progress
from halfbyte.models.decoder import Decoder
from halfbyte.specs import Request, SamplingParams

AT_ONCE = 16  # sequences in a forward
GROUP = 64  # sequences that are lost by a kill at most

Said = list[tuple[list[int], list[int]]]


def generated(
    opened: Callable[[], Decoder],
    prompts: Sequence[Sequence[int]],
    *,
    folder: Path,
    longest: int,
    stop_ids: frozenset[int],
    closing: Sequence[int],
    seed: int,
    progress: Progress | None = None,
) -> Said:
    """(prompt, what was said to it) of every prompt, at a temperature of 1.

    `opened` gives the decoder, where something is missing in the folder, which must be there. Both
    together are up to `longest` tokens; prompts that leave no room are left out. `closing` is put
    behind what came to its end.
    """
    fitting = [prompt for prompt in prompts if len(prompt) < longest]
    engine: Engine | None = None
    found: Said = []
    for start in range(0, len(fitting), GROUP):
        place, group = folder / f"{start}.json", fitting[start : start + GROUP]
        if not place.exists():
            if engine is None:
                decoder = opened()
                context = min(longest, decoder.spec.context)
                engine = Engine(decoder, context=context, max_sequences=AT_ONCE)
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
            _save(place, group, engine.generate(requests), closing)
        found += json.loads(place.read_text(encoding="utf-8"))
        if progress is not None:
            progress(len(found), len(fitting))
    if engine is not None:
        engine.close()
    return found


def _save(
    place: Path,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Completion],
    closing: Sequence[int],
) -> None:
    said: Said = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ended = closing if answer.finish_reason == "stop" else ()
        said.append(([*prompt], [*answer.token_ids, *ended]))
    data = json.dumps(said).encode()
    write_file(place, data)
