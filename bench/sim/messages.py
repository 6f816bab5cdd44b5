"""What routers and instances tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mesh.core.types import ModelRecord
from mesh.instance import flights
from mesh.instance.answers import LoadAnswer


@dataclass(frozen=True, slots=True)
class Wish(flights.Wish):
    """A Load call. ``miss`` numbers the load that it belongs to, for the checks: one load of a
    router, whoever waits for it, and whichever instances are asked. ``known`` is the model's record
    as the caller knows it, for while the store is away (in production its bytes)."""

    miss: int = 0
    known: ModelRecord | None = None


Answer = Callable[[LoadAnswer], None]


class Flight:
    """One load in an instance, from the first wish to its answer."""

    __slots__ = ("answers", "claim_revision", "in_cache", "record", "wish")

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.answers: list[Answer] = []
        self.record: ModelRecord | None = None
        self.claim_revision = 0
        self.in_cache = False
