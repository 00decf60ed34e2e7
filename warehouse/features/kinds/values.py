"""One typed value that comes from outside: what it may be, what stands for nothing, and the numbers that models read.

Models read float64 with NaN for NULL. A number is its own input; a boolean is 0 or 1; a word, which must be one of a declared
list, is one input per word (`request_device_is_phone`), so that no order is made up between words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from warehouse.errors import HeadraceError

TYPES = ("bigint", "double", "boolean", "varchar")
_EXAMPLES = {"bigint": "a whole number such as 3", "double": "a number such as 0.5", "boolean": "true or false"}

Value = int | float | bool | str | None


@dataclass(frozen=True)
class Typed:
    """A declared value. name: as the feature is called. empty: what stands for "not there". allowed: the words of a varchar."""

    name: str
    type: str
    empty: Value
    allowed: tuple[str, ...]
    description: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the numbers that models read."""
        return tuple(f"{self.name}_is_{word}" for word in self.allowed) if self.type == "varchar" else (self.name,)

    def checked(self, value: Any) -> Value:
        """The value in its type; the empty value for None. Raises HeadraceError with what would be right."""
        if value is None:
            return self.empty
        if self.type == "varchar":
            if isinstance(value, str) and value in self.allowed:
                return value
            raise HeadraceError(f"{self.name} must be one of {', '.join(self.allowed)}; got {_shown(value)}")
        if self.type == "boolean" and isinstance(value, bool):
            return value
        if self.type == "bigint" and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53:
            return value
        if self.type == "double" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        raise HeadraceError(f"{self.name} must be {_EXAMPLES[self.type]}; got {_shown(value)}")

    def numbers(self, value: Value) -> list[float]:
        """float64, one per input; NaN for NULL."""
        if value is None:
            return [math.nan] * len(self.inputs)
        return [float(value == word) for word in self.allowed] if self.type == "varchar" else [float(value)]


def typed(name: str, entry: Mapping[str, Any]) -> Typed:
    """A declared value from its YAML. Raises HeadraceError without a place: the caller adds file and line."""
    of = entry.get("type")
    if of not in TYPES:
        raise HeadraceError(f"{name}: type must be one of {', '.join(TYPES)}, got {of!r}")
    allowed = entry.get("allowed") or []
    if (of == "varchar") != bool(allowed) or not all(isinstance(word, str) for word in allowed):
        raise HeadraceError(
            f"{name}: a varchar, and only a varchar, names its words: allowed: [phone, desktop]; got {allowed!r}"
        )
    if len(set(allowed)) != len(allowed):
        raise HeadraceError(f"{name}: allowed names a word twice: {', '.join(allowed)}")
    value = Typed(name, of, None, tuple(allowed), entry.get("description") or "")
    try:
        empty = value.checked(entry.get("empty"))
    except HeadraceError as error:
        raise HeadraceError(f"{name}: empty: {error}") from None
    return Typed(name, of, empty, value.allowed, value.description)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
