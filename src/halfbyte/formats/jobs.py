"""The folder of a long job, which says what job it belongs to: all that decides its result.

The same job, started again, finds what it left; a folder of another job is emptied, so it must be a
folder that nobody else has anything in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.formats.atomic import write_errors, write_file

JOB = "job.json"

Job = Mapping[str, Any]


def claim(folder: Path, job: Job) -> None:
    """Makes `folder` the one of this job. Raises `InvalidInputError` where it cannot be made."""
    text = json.dumps(job, sort_keys=True)
    place = folder / JOB
    if place.is_file() and place.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(folder, ignore_errors=True)
    with write_errors(folder):
        folder.mkdir(parents=True)
    write_file(place, text.encode())
