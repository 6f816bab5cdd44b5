"""Reading one mapping of a resource, field by field, with errors and warnings that name a path.

``Fields`` wraps a mapping that came from YAML or JSON. Each accessor checks the type of what it
reads and raises ``InvalidArgument`` (path, expected, found); ``close`` turns what nobody read
into warnings. ``null`` is the same as absent, as it is for Kubernetes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mesh.core.errors import InvalidArgument

_SHOWN_CHARS = 60  # of a wrong value, in an error message


def found(value: object) -> str:
    """What a wrong value is, in the words of YAML."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {value!r:.{_SHOWN_CHARS}}"
        case str():
            return f"the string {value!r:.{_SHOWN_CHARS}}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"a mapping with {', '.join(sorted(map(str, value))[:5]) or 'nothing in it'}"
        case _:
            return f"a {type(value).__name__}"


def wrong(path: str, expected: str, value: object) -> InvalidArgument:
    return InvalidArgument(f"{path}: expected {expected}; found {found(value)}")


class Fields:
    """One mapping at ``path``, and the list that warnings go to."""

    def __init__(self, value: object, path: str, warnings: list[str]) -> None:
        if not isinstance(value, dict):
            raise wrong(path, "a mapping", value)
        self.raw: Mapping[str, Any] = value
        self._read: set[str] = set()
        self._warnings = warnings
        self.path = path

    def at(self, key: str) -> str:
        """The path of one field; a key with dots or slashes stands in brackets."""
        if "." in key or "/" in key:
            return f"{self.path}[{key}]"
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def take(self, key: str) -> Any:
        """The raw value, or None; counts as read."""
        self._read.add(key)
        return self.raw.get(key)

    def text(self, key: str, *, required: str = "", choices: Collection[str] = ()) -> str:
        """A string, "" when absent. ``required`` says what is expected when it must be there."""
        value = self.take(key)
        if value is None or value == "":
            if required:
                raise wrong(self.at(key), required, value)
            return ""
        if not isinstance(value, str):
            hint = " (put it in quotes)" if isinstance(value, (int, float)) else ""
            raise wrong(self.at(key), f"a string{hint}", value)
        if choices and value not in choices:
            raise wrong(self.at(key), f"one of {', '.join(choices)}", value)
        return value

    def integer(self, key: str, *, minimum: int) -> int | None:
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise wrong(self.at(key), f"a whole number of at least {minimum}", value)
        return value

    def text_map(self, key: str) -> dict[str, str]:
        """A mapping of strings to strings, empty when absent."""
        value = self.take(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise wrong(self.at(key), "a mapping of strings", value)
        inner = Fields(value, self.at(key), self._warnings)
        return {name: inner.text(name) for name in value if value[name] is not None}

    def fields(self, key: str, *, expected: str = "a mapping") -> Fields:
        """The mapping below ``key``, which must be there."""
        value = self.take(key)
        if not isinstance(value, dict):
            raise wrong(self.at(key), expected, value)
        return Fields(value, self.at(key), self._warnings)

    def optional_fields(self, key: str) -> Fields | None:
        """The mapping below ``key``, None when absent."""
        return self.fields(key) if self.take(key) is not None else None

    def close(self, kept: Collection[str] = ()) -> None:
        """Warn of every field that nobody read: one of ``kept`` is known, the rest is not."""
        for key in sorted(self.raw):
            if key in self._read or self.raw[key] is None:
                continue
            said = "kept, not acted on" if key in kept else "unknown field, ignored"
            self._warnings.append(f"{self.at(key)}: {said}")
