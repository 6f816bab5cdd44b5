"""What live settings in the store mean to placement.

``type_constraints``: on the instances of a format, in ModelMesh's form: ``{type: {"required":
[label, ...], "preferred": [label, ...]}}``, where the type ``_default`` stands for every format
that is not named. ``runtimes``: those whose pods somebody starts when they are wanted, by name:
``{name: {"formats": [...], "labels": [...]}}``; a request for a model that only they could serve
waits for a pod instead of failing. Both fail with ``InvalidArgument`` that names the place.
``servingruntimes`` means nothing to placement: resources that were applied, by kind and name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from mesh.core.errors import InvalidArgument
from mesh.core.types import TypeConstraint

# Names of live settings: the last part of their keys.
POLICY: Final = "policy"
TYPE_CONSTRAINTS: Final = "type_constraints"
RUNTIMES: Final = "runtimes"
SERVING_RUNTIMES: Final = "servingruntimes"

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


@dataclass(frozen=True, slots=True)
class PodRuntime:
    """A runtime whose pods come when they are wanted. ``labels``: what its instances have."""

    name: str
    model_types: frozenset[str]
    labels: frozenset[str]


def pod_runtimes(value: Mapping[str, object]) -> tuple[PodRuntime, ...]:
    """In the order of the setting. Raises InvalidArgument."""
    found = []
    for name, parts in value.items():
        if not isinstance(parts, Mapping):
            raise InvalidArgument(
                f'{RUNTIMES}.{name}: expected an object with "formats" and "labels"; '
                f"found {parts!r:.80}"
            )
        formats = _texts(parts, "formats", f"{RUNTIMES}.{name}")
        labels = _texts(parts, "labels", f"{RUNTIMES}.{name}")
        found.append(PodRuntime(name, frozenset(formats), frozenset(labels)))
    return tuple(found)


def _labels(parts: Mapping[str, object], model_type: str, part: str) -> tuple[str, ...]:
    return _texts(parts, part, f"{TYPE_CONSTRAINTS}.{model_type}")


def _texts(parts: Mapping[str, object], part: str, where: str) -> tuple[str, ...]:
    texts = parts.get(part, [])
    if not isinstance(texts, list | tuple) or not all(isinstance(x, str) and x for x in texts):
        what = "labels" if part != "formats" else "formats"
        raise InvalidArgument(f"{where}.{part}: expected a list of {what}; found {texts!r:.80}")
    return tuple(texts)


def check_config(name: str, value: Mapping[str, object]) -> None:
    """Raises InvalidArgument for a setting that makes no sense."""
    if name == TYPE_CONSTRAINTS:
        type_constraints(value)
    elif name == RUNTIMES:
        pod_runtimes(value)


class LiveConfig:
    """Settings by name, and what they mean to placement: part of a view."""

    def __init__(self) -> None:
        self.by_name: dict[str, Mapping[str, object]] = {}
        self.type_constraints: dict[str, TypeConstraint] = {}
        self.runtimes: tuple[PodRuntime, ...] = ()

    def put(self, name: str, value: Mapping[str, object]) -> None:
        """Raises InvalidArgument for what makes no sense; nothing changes then."""
        if name == TYPE_CONSTRAINTS:
            self.type_constraints = type_constraints(value)
        elif name == RUNTIMES:
            self.runtimes = pod_runtimes(value)
        self.by_name[name] = value

    def delete(self, name: str) -> None:
        self.by_name.pop(name, None)
        if name == TYPE_CONSTRAINTS:
            self.type_constraints = {}
        elif name == RUNTIMES:
            self.runtimes = ()

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

    def runtime_for(self, model_type: str, required: Collection[str]) -> PodRuntime | None:
        """The first whose pods could serve the format and have all the labels."""
        for runtime in self.runtimes:
            if model_type in runtime.model_types and runtime.labels.issuperset(required):
                return runtime
        return None
