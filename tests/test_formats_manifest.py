"""Writing whole or not at all, and manifests that notice every change."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import DoesNotFitError, IntegrityError, InvalidInputError
from halfbyte.formats.atomic import atomic_file
from halfbyte.formats.checkpoint import Checkpoint, read, write_gguf
from halfbyte.formats.manifest import check_sizes, verify, write_manifest


@pytest.fixture
def source(stories260k: Path) -> Checkpoint:
    return read(stories260k)


@pytest.fixture(params=["file", "directory"])
def artefact(request: pytest.FixtureRequest, source: Checkpoint, tmp_path: Path) -> Path:
    """A GGUF with its manifest, alone or in a directory of its own."""
    directory = tmp_path / "out"
    directory.mkdir()
    write_gguf(source, directory / "model.gguf")
    made = directory if request.param == "directory" else directory / "model.gguf"
    write_manifest(made, source=source.path, recipe="q4_0", method="rtn")
    return made


def weights(artefact: Path) -> Path:
    return artefact if artefact.is_file() else artefact / "model.gguf"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_an_artefact_as_it_was_made(artefact: Path) -> None:
    assert check_sizes(artefact)
    seen: list[tuple[int, int]] = []
    assert verify(artefact, lambda *done: seen.append(done)) == 1
    size = weights(artefact).stat().st_size
    assert seen[-1] == (size, size)


def test_what_a_manifest_says(artefact: Path, stories260k: Path) -> None:
    place = artefact / "manifest.json" if artefact.is_dir() else Path(f"{artefact}.manifest.json")
    document = json.loads(place.read_text())
    assert document["recipe"] == "q4_0" and document["method"] == "rtn"
    assert document["source"]["name"] == stories260k.name
    described = document["source"]["files"]
    assert described["config.json"]["sha256"] and described["model.safetensors"]["header_sha256"]
    assert document["files"].keys() == {"model.gguf"}


def test_the_cheap_check_sees_sizes_and_headers(artefact: Path) -> None:
    flip(weights(artefact), 100)
    with pytest.raises(IntegrityError, match=r"model\.gguf: header_sha256: .* says \w{64}, found"):
        check_sizes(artefact)
    flip(weights(artefact), 100)
    assert check_sizes(artefact)
    with weights(artefact).open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="bytes: the manifest says"):
        check_sizes(artefact)


def test_verify_sees_every_byte(artefact: Path) -> None:
    flip(weights(artefact), weights(artefact).stat().st_size - 1000)
    assert check_sizes(artefact), "the cheap check looks at sizes and headers only"
    with pytest.raises(IntegrityError, match=r"model\.gguf: sha256: .* says \w{64}, found \w{64}"):
        verify(artefact)


def test_missing_parts(artefact: Path) -> None:
    if artefact.is_dir():
        weights(artefact).unlink()
        with pytest.raises(IntegrityError, match=r"model\.gguf is missing"):
            check_sizes(artefact)
        (artefact / "manifest.json").unlink()
    else:
        Path(f"{artefact}.manifest.json").unlink()
    assert not check_sizes(artefact)
    with pytest.raises(InvalidInputError, match="no manifest"):
        verify(artefact)


@pytest.mark.parametrize(
    "document", ["[]", "{", '{"files": {}}', '{"files": {"../x": {}}}', '{"files": {"a": 1}}']
)
def test_a_manifest_is_untrusted(tmp_path: Path, document: str) -> None:
    (tmp_path / "manifest.json").write_text(document)
    with pytest.raises(IntegrityError):
        check_sizes(tmp_path)


class Interrupted:
    """A source whose stream ends with an error half way."""

    def __init__(self, source: Checkpoint, error: BaseException) -> None:
        self.source, self.error = source, error
        self.spec, self.schemes, self.assets = source.spec, source.schemes, source.assets

    def tensors(self) -> Iterator[Any]:
        for index, item in enumerate(self.source.tensors()):
            if index == 20:
                raise self.error
            yield item

    def tensor(self, name: str) -> Any:
        return self.source.tensor(name)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), DoesNotFitError),
        (IntegrityError("a bad weight"), IntegrityError),
    ],
)
def test_an_interrupted_writer_leaves_the_target_alone(
    source: Checkpoint, tmp_path: Path, error: BaseException, seen: type[BaseException]
) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"what was there before")
    with pytest.raises(seen):
        write_gguf(Interrupted(source, error), target)
    assert target.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [target]


def test_the_disk_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 999

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)  # pyright: ignore
    with atomic_file(tmp_path / "x", size=999):
        pass
    with (
        pytest.raises(DoesNotFitError, match="free"),
        atomic_file(tmp_path / "y", size=1000),
    ):
        raise AssertionError("the block must not begin")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "place", [lambda d: d, lambda d: d / "absent" / "x", lambda d: d / "file" / "x"]
)
def test_a_target_that_cannot_be_written(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError), atomic_file(place(tmp_path), size=1):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
