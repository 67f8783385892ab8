"""A repository in a cache folder, in the layout of Hugging Face's own cache.

    models--org--name/blobs/DIGEST              the bytes, once per content
    models--org--name/blobs/DIGEST.part         what has arrived of them
    models--org--name/snapshots/COMMIT/NAME  -> ../../blobs/DIGEST
    models--org--name/refs/REVISION             the commit a branch or tag was last seen at
    .locks/models--org--name/DIGEST.lock        held while the bytes are fetched

So files, and the locks on them, are shared with the other programs that use it. A name is a
digest, so what has arrived can only belong to the same content.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import IntegrityError
from halfbyte.formats.atomic import write_file
from halfbyte.formats.hub.listing import HEX_DIGITS, Kind, RemoteFile, is_wanted

CHUNK = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoCache:
    """What a cache folder holds of one repository."""

    root: Path
    repo: str

    @property
    def _folder(self) -> str:
        return f"models--{self.repo.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        return self.root / self._folder / "snapshots" / commit

    def blob(self, file: RemoteFile) -> Path:
        return self.root / self._folder / "blobs" / file.digest

    def part(self, file: RemoteFile) -> Path:
        return self.blob(file).with_name(f"{file.digest}.part")

    def present(self, file: RemoteFile) -> int:
        """How many of its bytes are here."""
        if self.complete(file):
            return file.size
        part = self.part(file)
        return min(part.stat().st_size, file.size) if part.exists() else 0

    def complete(self, file: RemoteFile) -> bool:
        return _has_size(self.blob(file), file.size)

    def has(self, commit: str, file: RemoteFile) -> bool:
        return _has_size(self.snapshot(commit) / file.name, file.size)

    def add(self, commit: str, file: RemoteFile) -> None:
        """The part becomes the blob, checked, and the snapshot names it.

        Raises `IntegrityError` when the bytes are not the hub's; they are removed.
        """
        blob, part = self.blob(file), self.part(file)
        if not self.complete(file):
            check(part, file, remove=True)
            part.replace(blob)
        link = self.snapshot(commit) / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f"{link.name}.{os.getpid()}.part")
        new.symlink_to(os.path.relpath(blob, link.parent))
        new.replace(link)

    @contextmanager
    def locked(self, file: RemoteFile) -> Generator[None]:
        """One process at a time fetches a file; the others wait."""
        lock = self.root / ".locks" / self._folder / f"{file.digest}.lock"
        for directory in (lock.parent, self.blob(file).parent):
            directory.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield

    def remember(self, revision: str, commit: str) -> None:
        """Note what a branch or tag is now, for those who ask offline."""
        reference = self.root / self._folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_file(reference, commit.encode())

    def recall(self, revision: str) -> tuple[Path, list[str]]:
        """The snapshot of a branch, tag or commit, and the usable names in it."""
        reference = self.root / self._folder / "refs" / revision
        commit = reference.read_text().strip() if reference.is_file() else revision
        directory = self.snapshot(commit)
        found = [path for path in directory.rglob("*") if path.is_file()]
        names = (path.relative_to(directory).as_posix() for path in found)
        return directory, sorted(name for name in names if is_wanted(name))


def check(path: Path, file: RemoteFile, *, remove: bool = False) -> None:
    """The hub's hash against that of the bytes here; a wrong file is removed if asked."""
    if not path.is_file():
        raise IntegrityError("is not in the cache", where=path, hint="pull it first")
    found = _digest(path, file.kind)
    if found == file.digest:
        return
    if remove:
        path.unlink()
    raise IntegrityError(
        f"{file.name}: {file.kind}: the hub says {file.digest}, found {found}",
        where=path,
        hint="it was removed; pull again, and if it stays wrong, do not use it"
        if remove
        else f"remove {path.resolve()} and pull again",
    )


def check_blob(path: Path) -> bool:
    """Hash a file of a snapshot against the name of its blob; False where it is no such file.

    The name is what the hub said when it was fetched, so this needs no network. Raises
    `IntegrityError`.
    """
    blob = path.resolve()
    kinds: list[Kind] = [kind for kind, digits in HEX_DIGITS.items() if digits == len(blob.name)]
    if blob == path.absolute() or blob.parent.name != "blobs" or not kinds:
        return False
    size = blob.stat().st_size
    check(path, RemoteFile(name=path.name, size=size, digest=blob.name, kind=kinds[0], url=""))
    return True


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _digest(path: Path, kind: Kind) -> str:
    digest = hashlib.sha256()
    if kind == "git-sha1":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
