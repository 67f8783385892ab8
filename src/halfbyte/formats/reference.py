"""What a person calls a model, as a path: `demo`, a directory or file, or a name on a hub.

A model's drafter lies beside it: `X.drafter.gguf` beside `X.gguf`; in a directory `drafter.gguf`, a
directory `drafter`, or a file `mtp-*.gguf`, as llama.cpp calls it.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from halfbyte.errors import IntegrityError
from halfbyte.formats.progress import Progress

DEMO = "demo"
DRAFTER = "drafter"


def locate(reference: str, progress: Progress | None = None) -> Path:
    """The directory or file that a reference means; fetched first if it is on a hub.

    Raises `InvalidInputError` when it is neither a path nor a hub name, and what `hub.pull` raises.
    """
    if reference == DEMO:
        return demo_path()
    path = Path(reference).expanduser()
    if path.exists():
        return path
    from halfbyte.formats.hub import pull

    return pull(reference, progress)


def locate_outline(reference: str) -> Path:
    """As `locate`, but of a model on a hub only what says what it is (`hub.outlined`)."""
    if reference == DEMO or Path(reference).expanduser().exists():
        return locate(reference)
    from halfbyte.formats.hub import outlined

    return outlined(reference)


def demo_path() -> Path:
    """The small model that comes with the package."""
    path = Path(__file__).parents[1] / "demo" / "model.gguf"
    if not path.is_file():
        raise IntegrityError("the demo model is missing", where=path, hint="install halfbyte again")
    return path


def drafter_beside(model: Path) -> Path | None:
    """The drafter of the model in a directory or file, if one lies where they lie."""
    folder = model if model.is_dir() else model.parent
    own = f"{model.stem}.{DRAFTER}.gguf" if model.is_file() else f"*.{DRAFTER}.gguf"
    named = (sorted(folder.glob(pattern)) for pattern in (own, f"{DRAFTER}.gguf", "mtp-*.gguf"))
    places = [*chain.from_iterable(named), folder / DRAFTER]
    return next((place for place in places if place.exists()), None)


def is_drafter_file(path: Path) -> bool:
    """Whether a .gguf file is by its name a drafter, not a model."""
    return path.name.endswith(f"{DRAFTER}.gguf") or path.name.startswith("mtp-")
