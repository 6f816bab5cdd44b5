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


def any_type_constraint(by_type: Mapping[str, TypeConstraint]) -> TypeConstraint | None:
    """For a format that has no entry of its own."""
    return by_type.get(ANY_TYPE)


def _labels(parts: Mapping[str, object], model_type: str, part: str) -> tuple[str, ...]:
    labels = parts.get(part, [])
    if not isinstance(labels, list | tuple) or not all(isinstance(x, str) and x for x in labels):
        raise InvalidArgument(
            f"{TYPE_CONSTRAINTS}.{model_type}.{part}: expected a list of labels; "
            f"found {labels!r:.80}"
        )
    return tuple(labels)
