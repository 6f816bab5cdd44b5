"""What instances told of how models are used: last uses and use scores, merged.

Each instance flushes a blob now and then (``lastused/<instance_id>``). Of what several tell of one
model the latest instant and the largest score count. It owns no clock and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType


class UsesTold:
    """Part of a view. Models that are not registered are for the view to leave out."""

    def __init__(self) -> None:
        self._last_used: dict[str, int] = {}
        self._scores: dict[str, float] = {}
        self._flushed: dict[str, int] = {}  # instance with a blob -> the latest use in it
        self.last_used: Mapping[str, int] = MappingProxyType(self._last_used)

    def tell(self, model_id: str, last_used_at_ms: int) -> None:
        """A model never used stays absent."""
        if last_used_at_ms > self._last_used.get(model_id, 0):
            self._last_used[model_id] = last_used_at_ms

    def tell_score(self, model_id: str, score: float) -> None:
        if score > self._scores.get(model_id, 0.0):
            self._scores[model_id] = score

    def score(self, model_id: str) -> float:
        return self._scores.get(model_id, 0.0)

    def forget(self, model_id: str) -> None:
        self._last_used.pop(model_id, None)
        self._scores.pop(model_id, None)

    def put_blob(self, instance_id: str, latest_at_ms: int) -> None:
        self._flushed[instance_id] = latest_at_ms

    def delete_blob(self, instance_id: str) -> None:
        """What it told is kept."""
        self._flushed.pop(instance_id, None)

    def clear_blobs(self) -> None:
        self._flushed.clear()

    def blobs(self) -> Iterator[tuple[str, int]]:
        """(instance, the latest use in its blob)"""
        return iter(self._flushed.items())
