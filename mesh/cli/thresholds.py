"""Thresholds of the policy as people write them: ``idle_unload_ms=30m``, ``load_slots=4``.

Only the text is read here; whether the value may be is ``mesh.core.policy``'s to say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from mesh.cli.exits import CommandError, Exit
from mesh.cli.quantities import parse_duration_ms, parse_size
from mesh.core.errors import InvalidArgument
from mesh.core.policy import Policy, overridden

_KINDS = {item.name: str(item.type) for item in fields(Policy)}


def parse_overrides(texts: Iterable[str]) -> dict[str, object]:
    """``NAME=VALUE`` texts, each one or several with commas between. Raises CommandError."""
    found: dict[str, object] = {}
    for text in filter(None, (part.strip() for whole in texts for part in whole.split(","))):
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise CommandError(f"{text!r}: write NAME=VALUE; `mesh policy` lists them", Exit.USAGE)
        try:
            found[name.strip()] = parse_value(name.strip(), value.strip())
        except ValueError as error:
            raise CommandError(f"policy.{name.strip()}: {error}", Exit.USAGE) from error
    return found


def parse_value(name: str, text: str) -> int | float | str:
    """By the kind of the threshold; what cannot be read as that stays a text, to be refused by who
    knows what is expected. A whole number of ms or bytes may be written `30m` or `1GiB`, a share
    `10%`."""
    kind = _KINDS.get(name)
    if kind == "str":
        return text
    if kind == "float" and text.endswith("%"):
        return float(text[:-1]) / 100
    for read in (float,) if kind == "float" else (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    if name.endswith("_ms"):
        return parse_duration_ms(text)
    if name.endswith("_bytes"):
        return parse_size(text)
    return text


def with_overrides(base: Policy, texts: Iterable[str] | None) -> Policy:
    """What `--policy` says on top of the other flags. Raises CommandError."""
    try:
        return overridden(base, parse_overrides(texts or ()))
    except InvalidArgument as error:
        raise CommandError(f"--policy: {error.message}", Exit.USAGE) from error
