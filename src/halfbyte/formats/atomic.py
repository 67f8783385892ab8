"""Write a file, or a directory of files, completely or not at all.

The bytes go to a `.part` beside the target, are flushed to the disk, and take the target's name in
one step. Whatever goes wrong before (an error, a full disk, Ctrl-C), the target is untouched and
the `.part` is removed. The part's name holds the process id: two writers never share one.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from halfbyte.errors import DoesNotFitError, HalfbyteError, InvalidInputError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_file(path: Path, *, size: int) -> Generator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well; `size` bytes will be written.

    Raises `DoesNotFitError` when the disk lacks the space, before or while writing, and
    `InvalidInputError` when the target cannot be written.
    """
    if path.is_dir():
        raise InvalidInputError("is a directory", where=path, hint="give the name of a file")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with write_errors(path):
            require_space(path.parent, size)
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            part.unlink()


def write_file(path: Path, data: bytes) -> None:
    """`data` as a file, whole or not at all; errors as of `atomic_file`."""
    with atomic_file(path, size=len(data)) as file:
        file.write(data)


@contextmanager
def atomic_directory(path: Path, *, size: int) -> Generator[Path]:
    """A folder to write into that becomes `path` when the block ends well; `size` bytes will be
    written. `path` must not be there yet, or be empty. Raises as `atomic_file` does."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidInputError(
            "is there already", where=path, hint="name a new directory, or remove it first"
        )
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            require_space(path.parent, size)
            part.mkdir()
            yield part
            for file in part.iterdir():
                _sync(file)
            part.replace(path)
            _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def write_errors(path: Path) -> Generator[None]:
    """What the system raises while `path` is written becomes ours."""
    try:
        yield
    except OSError as error:
        raise _translated(error, path) from error


def require_space(directory: Path, size: int) -> None:
    """Raises `DoesNotFitError` when the disk of an existing directory has under `size` bytes."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise DoesNotFitError(
            f"{size / 2**20:,.1f} MiB are needed on this disk and {free / 2**20:,.1f} MiB are free",
            where=directory,
            hint="free some space, or choose another disk",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _translated(error: OSError, path: Path) -> HalfbyteError:
    if error.errno in FULL:
        return DoesNotFitError(
            f"the disk became full: {error.strerror}", where=path, hint="free some space"
        )
    return InvalidInputError(
        f"cannot be written: {error.strerror}",
        where=path,
        hint="the directory must exist and be writable",
    )
