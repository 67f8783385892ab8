"""What a person calls a model, as a path: `demo`, a directory or file, or a name on a hub."""

from __future__ import annotations

from pathlib import Path

from halfbyte.errors import IntegrityError
from halfbyte.formats.progress import Progress

DEMO = "demo"


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


def demo_path() -> Path:
    """The small model that comes with the package."""
    path = Path(__file__).parents[1] / "demo" / "model.gguf"
    if not path.is_file():
        raise IntegrityError("the demo model is missing", where=path, hint="install halfbyte again")
    return path
