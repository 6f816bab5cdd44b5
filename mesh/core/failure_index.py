"""Failures of loads by model and instance: part of a view."""

from __future__ import annotations

from collections.abc import Iterator

from mesh.core.types import FailureRecord


class FailureIndex:
    """Records as they stand in the store, expired ones too, until they are deleted there."""

    def __init__(self) -> None:
        self._by_model: dict[str, dict[str, FailureRecord]] = {}

    def put(self, record: FailureRecord) -> None:
        self._by_model.setdefault(record.model_id, {})[record.instance_id] = record

    def delete(self, model_id: str, instance_id: str) -> None:
        by_instance = self._by_model.get(model_id)
        if by_instance is None:
            return
        by_instance.pop(instance_id, None)
        if not by_instance:
            del self._by_model[model_id]

    def of(self, model_id: str, now_ms: int) -> tuple[FailureRecord, ...]:
        """Unexpired ones, the latest first."""
        by_instance = self._by_model.get(model_id)
        if not by_instance:
            return ()
        unexpired = [f for f in by_instance.values() if f.expires_at_ms > now_ms]
        unexpired.sort(key=lambda f: (-f.failed_at_ms, f.instance_id))
        return tuple(unexpired)

    def all(self) -> Iterator[FailureRecord]:
        for by_instance in self._by_model.values():
            yield from by_instance.values()
