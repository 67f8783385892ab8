"""The one exception tree: what was wrong, where, and which knob to turn.

    HalfbyteError            exit 1   anything that failed while running
     +- UnsupportedError     exit 1   an architecture, scheme or feature we do not run
     +- InvalidInputError    exit 2   a value, prompt or flag outside its range
     +- DoesNotFitError      exit 3   more memory, context or disk than there is
     +- IntegrityError       exit 4   a file that is truncated, altered, incomplete or not a number
     +- NetworkError         exit 5   a hub that is unreachable, gated or refuses
     +- OutOfMemoryError     exit 6   memory ran out while running
     +- GateMissedError      exit 7   a measured threshold was missed

Errors from libraries are translated where they are raised; the command line prints the text of
these and nothing else. Ctrl-C exits with 130.
"""

from __future__ import annotations

from pathlib import Path


class HalfbyteError(Exception):
    """An error for a person: `what` happened, `where` (a file, tensor or flag), `hint` what to do.

    `str(error)` is the complete message, one line for the fact and one for the hint.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str | Path | None = None, hint: str | None = None
    ) -> None:
        self.what = what
        self.where = str(where) if where is not None else None
        self.hint = hint
        fact = f"{self.where}: {what}" if self.where else what
        super().__init__(f"{fact}\n  hint: {hint}" if hint else fact)


class UnsupportedError(HalfbyteError):
    """Understood, but nothing here can run or store it."""


class InvalidInputError(HalfbyteError):
    """The caller's value is outside what is allowed."""

    exit_code = 2


class DoesNotFitError(HalfbyteError):
    """It needs more than there is; the hint names the nearest thing that would fit."""

    exit_code = 3


class IntegrityError(HalfbyteError):
    """A file is not what it claims to be."""

    exit_code = 4


class NetworkError(HalfbyteError):
    """A hub could not be reached or would not serve."""

    exit_code = 5


class OutOfMemoryError(HalfbyteError):
    """An allocation failed while running."""

    exit_code = 6


class GateMissedError(HalfbyteError):
    """A measurement missed its threshold."""

    exit_code = 7
