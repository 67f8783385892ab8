"""Tool calls as a model may write them, in every dialect."""

from __future__ import annotations

import json
from contextlib import suppress

from halfbyte.text.tools import DIALECTS, QUOTE, MalformedCallError


def one_input(data: bytes) -> None:
    text = data.decode("utf-8", "ignore")
    for dialect in DIALECTS:
        body = text.replace(dialect.quote, QUOTE) if dialect.quote else text
        with suppress(MalformedCallError):
            for call in dialect.parse(body):
                json.dumps([call.name, call.arguments], ensure_ascii=False, allow_nan=False)
