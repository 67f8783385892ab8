"""Reading `quantization_config`, strictly: a field that would change the numbers is never passed
over. What only tells how a checkpoint was made is, by name; null, false and empty say nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families.fields import Fields

FIELD = "quantization_config"


def settings_of(config: Mapping[str, Any]) -> Fields | None:
    """The quantization_config of a config.json (or of its text_config), None if it has none."""
    text = config.get("text_config")
    found = config.get(FIELD) or (text.get(FIELD) if isinstance(text, Mapping) else None)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise IntegrityError(f"the field '{FIELD}' is no table")
    return table(found, FIELD)


def table(values: Mapping[str, Any], name: str) -> Fields:
    """A table whose errors name its fields in full."""
    return Fields({f"{name}.{key}": value for key, value in values.items()}, prefix=f"{name}.")


def keys(settings: Fields) -> list[str]:
    """The fields that say something."""
    return [
        key.removeprefix(settings.prefix)
        for key, value in settings.values.items()
        if value not in (None, False, "", [], {})
    ]


def refuse_unknown(settings: Fields, known: Collection[str]) -> None:
    """Raises `UnsupportedError` for a field outside `known` that says something."""
    for key in keys(settings):
        if key not in known:
            raise UnsupportedError(f"the field '{settings.prefix}{key}' is unknown")


def require(settings: Fields, key: str, allowed: Collection[Any], default: Any = None) -> Any:
    """The value of a field, which must be one of `allowed`; else `UnsupportedError` names it."""
    value = settings.get(key, default)
    if value not in allowed:
        raise UnsupportedError(
            f"{settings.prefix}{key} is {value!r:.60}",
            hint=f"readable: {', '.join(map(repr, allowed))}",
        )
    return value


def group_size(settings: Fields, key: str = "group_size") -> int | None:
    """Weights in a group; None, stored as -1, for a whole row."""
    return None if settings.get(key) == -1 else settings.integer(key)
