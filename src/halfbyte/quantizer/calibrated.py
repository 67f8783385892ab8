"""A source quantized with calibration: the whole job, and its folder.

The folder lies beside the output while the work goes on, and outlives whatever stops it; it is
removed when the output is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from halfbyte import __version__
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.quantizer.blockwise import Blockwise
from halfbyte.quantizer.calibrate import Calibration
from halfbyte.quantizer.pipeline import schemes_of
from halfbyte.quantizer.quantization import Quantization
from halfbyte.quantizer.stages import Finished, Stages
from halfbyte.quantizer.two_sided import TwoSided
from halfbyte.specs import Recipe, SolveMethod


@contextmanager
def calibrated(
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    *,
    method: SolveMethod,
    weights: str,
    folder: Path,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Generator[Source]:
    """The quantized source; when the block ends well, `folder` is gone.

    `weights` is a hash of the source's weights (`weights_hash`). A folder that a stopped run of the
    same job has left is taken up. Raises as `Blockwise.run` does, and `InvalidInputError` for
    weights that are quantized already.
    """
    schemes = schemes_of(source, recipe)
    job: Mapping[str, Any] = {
        "halfbyte": __version__,
        "weights": weights,
        "schemes": {name: scheme.name for name, scheme in schemes.items()},
        "method": method,
        "windows": hashlib.sha256(json.dumps(calibration.windows).encode()).hexdigest(),
        "seed": calibration.sampling.seed,
        # Sums may be ordered by both.
        "device": device.partition(":")[0],
        "threads": torch.get_num_threads(),
    }
    stages = Stages(folder, spec=source.spec, schemes=schemes, job=job)
    asked = Quantization(
        source=source,
        schemes=schemes,
        method=method,
        calibration=calibration,
        stages=stages,
        device=device,
    )
    yield quantized(asked, progress)
    stages.remove()


def quantized(asked: Quantization, progress: Progress | None = None) -> Source:
    """The quantized source; what is made stays in its stages. Raises as `Blockwise.run` does."""
    if not asked.stages.complete:
        job = TwoSided(asked) if asked.method == "yaqa" else Blockwise(asked)
        job.run(progress)
    return Finished(asked.source, asked.stages, asked.schemes)
