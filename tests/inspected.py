"""The pages that `inspect` prints for known models, kept in tests/pages to be read and compared.

    PYTHONPATH=src:tests python -m inspected

writes them anew; read the difference against the model cards before it is committed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from click.testing import CliRunner
from published import PUBLISHED
from test_families_published import write_zeros

from halfbyte.cli.inspect import command
from halfbyte.formats.reference import demo_path

PAGES = Path(__file__).parent / "pages"
MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"


def page(path: Path) -> str:
    """What inspect prints, without the line of the path."""
    outcome = CliRunner().invoke(command, [str(path)], catch_exceptions=False)
    return outcome.output.partition("\n")[2]


def published(name: str) -> str:
    """The page of a published config at its full size, over weights that are one large hole."""
    with TemporaryDirectory() as folder:
        write_zeros(PUBLISHED[name][0], Path(folder))
        return page(Path(folder))


FIXTURES: dict[str, Callable[[], str]] = {
    "demo": lambda: page(demo_path()),
    "tiny-gemma4": lambda: page(MODELS / "tiny-gemma4"),
    "stories260K": lambda: page(MODELS / "stories260K"),
    **{
        name: lambda name=name: published(name)
        for name in ("qwen2-0.5b", "gemma3-4b", "gemma4-12b", "gemma4-26b-a4b", "gemma4-e2b")
    },
}

if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for name, made in FIXTURES.items():
        (PAGES / f"{name}.txt").write_text(made(), encoding="utf-8")
