"""The JSON schema of a `response_format`, in any of its four spellings. Pure.

OpenAI wraps it, Dify sends whatever was typed into its form (bare, or as a string), and llama.cpp
has two forms of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from halfbyte.serve.failure import refused
from halfbyte.serve.wire import Object
from halfbyte.text.structure import ANY_OBJECT

PARAM = "response_format"


def schema_of(given: Object | None) -> Mapping[str, Any] | None:
    """The schema; None for text. Raises `Failure`."""
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object", "schema": dict() as schema}:
            return cast(Object, schema)
        case {"type": "json_object"}:
            return ANY_OBJECT
        case {"type": "json_schema"}:
            return _inside(given.get("json_schema", given.get("schema")))
        case _:
            raise refused("response_format.type is text, json_object or json_schema", PARAM)


def _inside(given: object) -> Mapping[str, Any]:
    """The schema in OpenAI's wrapping, or bare, or either as a string of JSON."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise refused(f"the schema is not JSON: {error}", PARAM, "invalid_schema") from error
    match given:
        case {"schema": dict() as schema}:
            return cast(Object, schema)
        case dict():
            return cast(Object, given)
        case _:
            raise refused("response_format has no schema", PARAM, "invalid_schema")
