"""A file mapped into memory, read-only, whose pages can be given back.

Views share the file's pages and cost no copy. `release` drops the pages of a stretch from the
resident set, so that streaming a large checkpoint keeps about one tensor resident; a view of
released pages stays valid and is read again from the file when it is touched. The price: if the
file is truncated by somebody else while mapped, touching it ends the process.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from halfbyte.errors import IntegrityError


class MappedFile:
    """`size` bytes of `path`. `buffer` is the raw map, for parsing headers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise IntegrityError("the file is empty", where=path) from error
        except OSError as error:
            raise IntegrityError(f"cannot be read: {error.strerror}", where=path) from error
        self.size = len(self.buffer)

    def view(self, start: int, stop: int) -> np.ndarray:
        """Bytes `[start, stop)` as a read-only uint8 array, without a copy."""
        return np.frombuffer(self.buffer, dtype=np.uint8, count=stop - start, offset=start)

    def release(self, start: int, stop: int) -> None:
        """Give back the pages of `[start, stop)`, where the system can."""
        if hasattr(mmap, "MADV_DONTNEED"):
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self.buffer.madvise(mmap.MADV_DONTNEED, page, stop - page)
