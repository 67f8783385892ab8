"""Reading fields of a config.json or of GGUF metadata with errors a person can use.

Both are untrusted mappings: a missing field, a wrong type or an absurd size is an
`InvalidInputError` that names the field, never a KeyError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from halfbyte.errors import IntegrityError

LARGEST = 2**31 - 1
MOST_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Fields:
    """A mapping with typed reads. `prefix` is put before every key (GGUF: "llama.")."""

    values: Mapping[str, Any]
    prefix: str = ""

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; null counts as absent."""
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number in [1, 2^31)."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
            raise self._wrong(key, value, "a whole number above 0")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number in [0, 2^31)."""
        value = self._required(key, default)
        return 0 if type(value) is int and value == 0 else self.integer(key, default)

    def layers(self, key: str, default: int | None = None) -> int:
        """A number of layers: a whole number in [1, 4096], since each becomes a value here."""
        count = self.integer(key, default)
        if count > MOST_LAYERS:
            raise self._wrong(key, count, f"at most {MOST_LAYERS}")
        return count

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A finite number above 0, or None."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def table(self, key: str) -> Fields:
        """A nested mapping; empty when absent."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "a table")
        return Fields(cast("Mapping[str, Any]", value))

    def sequence(self, key: str) -> Sequence[Any] | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self._wrong(key, value, "a list")
        return cast("Sequence[Any]", value)

    def per_layer(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """A number for every layer: stored as one number or as a list of `layers` numbers."""
        value = self._required(key, default)
        values = cast("list[Any]", list(value)) if isinstance(value, Sequence) else [value] * layers
        if len(values) != layers or not all(
            isinstance(item, int) and 0 < item <= LARGEST for item in values
        ):
            raise self._wrong(key, value, f"a number or {layers} numbers above 0")
        return [int(item) for item in values]

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise IntegrityError(f"the field '{self.prefix + key}' is missing")
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> IntegrityError:
        shown = repr(value)
        return IntegrityError(
            f"the field '{self.prefix + key}' is {shown[:60]}; it must be {wanted}"
        )


def layer_types(windows: Sequence[int | None]) -> list[str]:
    """A config.json's words for layers with these windows."""
    return ["full_attention" if window is None else "sliding_attention" for window in windows]
