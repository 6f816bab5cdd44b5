"""Loads that somebody waits for: one ``Flight`` a model; everybody who asks for it joins it.

Holds who waits and for what, and decides nothing. Cancelling a waiter never cancels a load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from mesh.core.types import LoadPriority, ModelRecord
from mesh.instance.answers import LoadAnswer

_RANK: Final = {LoadPriority.AWAITED: 0, LoadPriority.COPY: 1, LoadPriority.PROACTIVE: 2}


@dataclass(frozen=True, slots=True)
class Wish:
    """A Load request. ``revision`` is what the router's decision saw."""

    model_id: str
    revision: int
    last_used_at_ms: int = 0
    priority: LoadPriority = LoadPriority.AWAITED
    record: bytes = b""  # as in the store: what is loaded by while the store is away
    pin: bool = False
    use_score: float = 0.0
    reason: str = ""  # in the words of the decision that asks

    def joined_by(self, other: Wish) -> Wish:
        """What is wanted when both are; the claim is made as of this one's revision."""
        first = other if _RANK[other.priority] < _RANK[self.priority] else self
        return replace(
            first,
            revision=self.revision,
            last_used_at_ms=max(self.last_used_at_ms, other.last_used_at_ms),
            record=self.record or other.record,
            pin=self.pin or other.pin,
            use_score=max(self.use_score, other.use_score),
        )


class Flight:
    """One load, from the first wish to its answer."""

    __slots__ = ("answer", "claim_revision", "in_cache", "record", "told", "wish")

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.answer: asyncio.Future[LoadAnswer] = asyncio.get_running_loop().create_future()
        self.record: ModelRecord | None = None  # once it is read
        self.claim_revision = 0
        self.in_cache = False
        # What a watch said of the model meanwhile: revision, record or None when it was deleted.
        self.told: tuple[int, ModelRecord | None] | None = None


class Flights:
    """Those under way, by model."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}

    def get(self, model_id: str) -> Flight | None:
        return self._flights.get(model_id)

    def beginning(self) -> Iterator[str]:
        """Models whose load has not come to the cache yet."""
        return (model_id for model_id, flight in self._flights.items() if not flight.in_cache)

    def start(self, wish: Wish) -> Flight:
        flight = self._flights[wish.model_id] = Flight(wish)
        return flight

    def finish(self, flight: Flight, answer: LoadAnswer) -> None:
        if self._flights.get(flight.wish.model_id) is flight:
            del self._flights[flight.wish.model_id]
        if not flight.answer.done():
            flight.answer.set_result(answer)

    def end(self, model_id: str, answer: LoadAnswer) -> None:
        """The cache has spoken; a flight that has not come to it yet goes on."""
        flight = self._flights.get(model_id)
        if flight is not None and flight.in_cache:
            self.finish(flight, answer)
