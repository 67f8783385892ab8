"""A chat template: a conversation in, the prompt's text out.

A template is untrusted code from a model file; sandbox.py bounds what it can reach and cost. What
it prints is trusted as far as its special-token strings are concerned: see chat.py.

Source: Hugging Face's chat templates (the variables and functions that templates expect).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from jinja2.exceptions import SecurityError, TemplateSyntaxError

from halfbyte.errors import HalfbyteError, IntegrityError, InvalidInputError
from halfbyte.text.assets import MAX_TEMPLATE_CHARACTERS
from halfbyte.text.sandbox import RefusedError, Sandbox

MAX_OUTPUT_CHARACTERS = 2**22
_WHERE = "chat template"
_RAW = "look at it with 'halfbyte inspect', or use --raw to prompt without a template"


class ChatTemplate:
    """A compiled template. Threads may share it; they render one after the other."""

    def __init__(self, source: str) -> None:
        """Raises IntegrityError if the text is too long or is no template."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise IntegrityError("it is too long", where=_WHERE, hint=_RAW)
        self._source = source
        self._sandbox = Sandbox()
        self._lock = Lock()
        try:
            self._template = self._sandbox.from_string(source)
        except TemplateSyntaxError as error:
            raise IntegrityError(
                f"line {error.lineno}: {error.message}", where=_WHERE, hint=_RAW
            ) from error
        except (RecursionError, MemoryError, ValueError, SyntaxError) as error:
            raise IntegrityError(f"it does not compile ({error})", where=_WHERE) from error

    def names(self, variable: str) -> bool:
        """Whether the template has this word in it."""
        return re.search(rf"\b{re.escape(variable)}\b", self._source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        bos: str = "",
        eos: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for these messages ({"role": ..., "content": ...}).

        `enable_thinking` None leaves the choice to the template. Raises InvalidInputError when
        the template refuses the messages or fails on them, IntegrityError when it reaches or
        works beyond its bounds.
        """
        variables: dict[str, Any] = {
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "bos_token": bos,
            "eos_token": eos,
            "add_generation_prompt": add_generation_prompt,
        }
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        with self._lock:
            try:
                return self._rendered(variables)
            except HalfbyteError:
                raise
            except Exception as error:  # whatever the template's code raises
                raise _translated(error) from error

    def _rendered(self, variables: Mapping[str, Any]) -> str:
        self._sandbox.start()
        pieces: list[str] = []
        length = 0
        for piece in self._template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT_CHARACTERS:
                raise SecurityError(f"it prints more than {MAX_OUTPUT_CHARACTERS} characters")
        return "".join(pieces)


def _translated(error: Exception) -> HalfbyteError:
    match error:
        case RefusedError():
            return InvalidInputError(
                f"the template refuses these messages: {error}",
                where=_WHERE,
                hint="check the order of the roles and the fields of each message",
            )
        case SecurityError() | RecursionError() | MemoryError() | OverflowError():
            reason = str(error) or type(error).__name__
            return IntegrityError(f"stopped: {reason}", where=_WHERE, hint=_RAW)
        case _:
            return InvalidInputError(
                f"it fails on these messages ({type(error).__name__}: {error})",
                where=_WHERE,
                hint="each message needs a role and a content that the template knows; " + _RAW,
            )
