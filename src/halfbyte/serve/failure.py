"""What a client is told when something is wrong: a status, a kind, a code, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfbyte.errors import (
    DoesNotFitError,
    HalfbyteError,
    IntegrityError,
    InvalidInputError,
    OutOfMemoryError,
    UnsupportedError,
)

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


@dataclass(slots=True, eq=False)
class Failure(Exception):
    """An answer that is an error. `param` names the field at fault."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def kind(self) -> str:
        return KINDS.get(self.status, "server_error" if self.status >= 500 else KINDS[400])

    def document(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def anthropic(self) -> dict[str, Any]:
        """As Anthropic's clients read it."""
        kinds = {"server_error": "api_error", "service_unavailable": "overloaded_error"}
        error = {"type": kinds.get(self.kind, self.kind), "message": self.message}
        return {"type": "error", "error": error}


def refused(message: str, param: str | None = None, code: str | None = None) -> Failure:
    """The client's fault."""
    return Failure(400, message, code, param)


def failure_of(error: Exception) -> Failure:
    """What a client is told of an error."""
    match error:
        case Failure():
            return error
        case MemoryError() | OutOfMemoryError():
            return Failure(
                503, "there was not enough memory", "out_of_memory", headers={"retry-after": "5"}
            )
        case InvalidInputError() | UnsupportedError() | DoesNotFitError() | IntegrityError():
            return refused(_sentence(error))
        case _:
            return Failure(
                500,
                "something went wrong in the server; its log says what",
                "internal_error",
                headers={"x-should-retry": "false"},
            )


def too_long(prompt: int, context: int, wanted: int | None) -> Failure:
    """A prompt beyond the context, in words that clients look for."""
    more = "" if wanted is None else f" and up to {wanted} in the completion"
    return refused(
        f"This model's maximum context length is {context} tokens. However, your request has "
        f"{prompt} tokens in the messages{more}. Please reduce the length of the messages.",
        "messages",
        "context_length_exceeded",
    )


def _sentence(error: HalfbyteError) -> str:
    """An error without folders of this machine: `where` may name one."""
    return f"{error.what} ({error.hint})" if error.hint else error.what
