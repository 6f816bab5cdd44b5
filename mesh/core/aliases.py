"""Which names mean a model, and which names are on their way to another: part of a view.

An index over ``VModelRecord``s, told of each change. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.core.types import VModelRecord


class Aliases:
    """By model id the names whose active or target model it is."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[str, ...]] = {}
        self.moving: set[str] = set()  # names whose target is still to be loaded

    def put(self, record: VModelRecord, before: VModelRecord | None) -> Iterable[str]:
        """Returns the models that a name came to or went from."""
        if record.target_model_id != record.active_model_id or record.awaits_load:
            self.moving.add(record.name)
        else:
            self.moving.discard(record.name)
        named, named_before = _named(record), _named(before)
        for model_id in named_before - named:
            self._unname(model_id, record.name)
        for model_id in named - named_before:
            self._names[model_id] = (*self._names.get(model_id, ()), record.name)
        return named ^ named_before

    def delete(self, record: VModelRecord) -> Iterable[str]:
        """Returns the models that the name went from."""
        self.moving.discard(record.name)
        named = _named(record)
        for model_id in named:
            self._unname(model_id, record.name)
        return named

    def of(self, model_id: str) -> tuple[str, ...]:
        return self._names.get(model_id, ())

    def _unname(self, model_id: str, name: str) -> None:
        left = tuple(known for known in self._names.get(model_id, ()) if known != name)
        if left:
            self._names[model_id] = left
        else:
            self._names.pop(model_id, None)


def _named(record: VModelRecord | None) -> frozenset[str]:
    if record is None:
        return frozenset()
    return frozenset((record.active_model_id, record.target_model_id))
