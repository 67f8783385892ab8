"""A report in one file, to be attached where somebody asks for help.

Made of what the doctor found and of the facts that it looked at; no weights, no vocabulary, no
texts. Its README says what is inside and what was taken out.
"""

from __future__ import annotations

import json
import platform
import pwd
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from os import getuid
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from halfbyte import __version__, env
from halfbyte.planner.doctor.redaction import Redaction

README = """What halfbyte doctor found ({version}), and what it looked at.

doctor.json    what each check says, and the plan
machine.json   the machine: processor, memory, disks, cards, packages, the processes on the cards
model.json     the model, if one was given: its config.json or the short values of its GGUF header,
               how many matrices are stored how, its special tokens and stops; neither weights nor
               vocabulary nor chat template

Taken out: access tokens, passwords and keys; the home folder and other people's (written ~); the
names of user and machine (USER, HOST); the model's name, folder and origin (MODEL). Folders outside
of home stay. Look through it before you give it away: it is three short texts.
"""


def plain(value: Any) -> Any:
    """Facts as JSON values: dataclasses are tables, sets sorted lists, infinities null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {it.name: plain(getattr(value, it.name)) for it in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(map(plain, value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return None
    return value


def write_bundle(path: Path, files: Mapping[str, Any], redaction: Redaction) -> None:
    """A zip of JSON documents by name, redacted, with a README."""
    with ZipFile(path, "w", ZIP_DEFLATED) as bundle:
        bundle.writestr("README.txt", README.format(version=__version__))
        for name, value in files.items():
            text = json.dumps(redaction.of(plain(value)), indent=2, ensure_ascii=False)
            bundle.writestr(name, text + "\n")


def redaction_of(model: str | None = None, place: Path | None = None) -> Redaction:
    """What must not be seen of this user, this machine, and the model that was asked about."""
    folders = {str(Path.home()): "~"}
    names = {platform.node(): "HOST", _user(): "USER"}
    if place is not None:
        folders |= {str(place.absolute()): "MODEL", str(place.resolve()): "MODEL"}
        names[place.name] = "MODEL"
    if model is not None and model != "demo":
        folders[model] = "MODEL"
    return Redaction(
        secrets=frozenset(env.secrets()),
        names={name: stand_in for name, stand_in in names.items() if len(name) > 2},
        folders={folder: stand_in for folder, stand_in in folders.items() if len(folder) > 1},
    )


def _user() -> str:
    try:
        return pwd.getpwuid(getuid()).pw_name
    except KeyError:
        return ""
