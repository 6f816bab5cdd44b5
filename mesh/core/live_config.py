"""What live settings in the store mean to placement: constraints on the instances of a format.

The form is ModelMesh's: ``{type: {"required": [label, ...], "preferred": [label, ...]}}``, where
the type ``_default`` stands for every format that is not named. It fails with ``InvalidArgument``
that names the place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mesh.core.errors import InvalidArgument
from mesh.core.types import TypeConstraint

# Names of live settings: the last part of their keys.
POLICY: Final = "policy"
TYPE_CONSTRAINTS: Final = "type_constraints"

# The entry for formats without one of their own.
ANY_TYPE: Final = "_default"

_PARTS: Final = ("required", "preferred")


def type_constraints(value: Mapping[str, object]) -> dict[str, TypeConstraint]:
    """By format. Raises InvalidArgument."""
    found = {}
    for model_type, parts in value.items():
        if not isinstance(parts, Mapping):
            raise InvalidArgument(
                f"{TYPE_CONSTRAINTS}.{model_type}: expected an object with "
                f'"required" and "preferred"; found {parts!r:.80}'
            )
        if unknown := sorted(set(parts) - set(_PARTS)):
            raise InvalidArgument(
                f"{TYPE_CONSTRAINTS}.{model_type}: unknown field {unknown[0]!r}; there are "
                f"{', '.join(_PARTS)}"
            )
        required, preferred = (_labels(parts, model_type, part) for part in _PARTS)
        found[model_type] = TypeConstraint(model_type, required, preferred)
    return found


def _labels(parts: Mapping[str, object], model_type: str, part: str) -> tuple[str, ...]:
    labels = parts.get(part, [])
    if not isinstance(labels, list | tuple) or not all(isinstance(x, str) and x for x in labels):
        raise InvalidArgument(
            f"{TYPE_CONSTRAINTS}.{model_type}.{part}: expected a list of labels; "
            f"found {labels!r:.80}"
        )
    return tuple(labels)


class LiveConfig:
    """Settings by name, and what they mean to placement: part of a view."""

    def __init__(self) -> None:
        self.by_name: dict[str, Mapping[str, object]] = {}
        self.type_constraints: dict[str, TypeConstraint] = {}

    def put(self, name: str, value: Mapping[str, object]) -> None:
        """Raises InvalidArgument for type constraints that make no sense; nothing changes then."""
        if name == TYPE_CONSTRAINTS:
            self.type_constraints = type_constraints(value)
        self.by_name[name] = value

    def delete(self, name: str) -> None:
        self.by_name.pop(name, None)
        if name == TYPE_CONSTRAINTS:
            self.type_constraints = {}

    def replace(self, values: Mapping[str, Mapping[str, object]]) -> None:
        """A snapshot: what it does not hold is gone."""
        for name in [known for known in self.by_name if known not in values]:
            self.delete(name)
        for name, value in values.items():
            self.put(name, value)

    def constraint_of(self, model_type: str) -> TypeConstraint | None:
        """Of the format, or of ``_default``."""
        if not self.type_constraints:
            return None
        return self.type_constraints.get(model_type) or self.type_constraints.get(ANY_TYPE)
