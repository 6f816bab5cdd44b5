"""The reasons of the thresholds: the comments above the fields of ``mesh.core.policy.Policy``.

They are read from the source when somebody asks for them, so that there is one text for who reads
the code and for who runs `mesh policy`. Without the source (a frozen program) there are no reasons;
nothing fails.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields
from functools import cache
from typing import Final

from mesh.core.policy import Policy, expected

_FIELD: Final = re.compile(r"    (\w+): \w+ = ")
_HEADING: Final = re.compile(r"    # -{4,} (.+?) -{4,}")
_COMMENT: Final = re.compile(r"    # (.+)")
_MORE: Final = "..."

UNITS: Final[dict[str, str]] = {
    "_ms": "ms",
    "_us": "us",
    "_bytes": "bytes",
    "_share": "share",
    "_share_max": "share",
    "_per_minute": "per minute",
}


@dataclass(frozen=True, slots=True)
class Threshold:
    """One field of Policy, for people."""

    name: str
    default: int | float | str
    unit: str
    expected: str
    group: str  # the heading above it, "" for none
    reason: str


@cache
def thresholds() -> tuple[Threshold, ...]:
    """Every field, in the order of the source."""
    try:
        told = reasons(inspect.getsource(Policy))
    except (OSError, TypeError):  # there is no source
        told = {}
    default = Policy()
    return tuple(
        Threshold(
            item.name,
            getattr(default, item.name),
            unit(item.name),
            expected(item.name, str(item.type)),
            *told.get(item.name, ("", "")),
        )
        for item in fields(Policy)
    )


def unit(name: str) -> str:
    """By how the name ends; "" for a count or a choice."""
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def reasons(source: str) -> dict[str, tuple[str, str]]:
    """Name of a field to its heading and the comment above it.

    A field without a comment shares that of the field before; a comment that begins with dots goes
    on with the last one that does not.
    """
    found: dict[str, tuple[str, str]] = {}
    group, head, reason = "", "", ""
    lines: list[str] = []
    for line in source.splitlines():
        if heading := _HEADING.match(line):
            group, lines = heading[1], []
        elif field := _FIELD.match(line):
            if lines:
                text = " ".join(lines).removesuffix(_MORE).rstrip()
                if text.startswith(_MORE):
                    reason = f"{head} {text}"
                else:
                    head = reason = text
            found[field[1]] = (group, reason)
            lines = []
        elif comment := _COMMENT.match(line):
            lines.append(comment[1].strip())
        else:
            lines = []
    return found
