"""What the request path knows of a copy."""

from __future__ import annotations


class Use:
    """What the request path knows of one copy. It alone writes; the cache reads."""

    __slots__ = ("in_flight", "last_used_at_ms", "uses")

    def __init__(self, last_used_at_ms: int = 0) -> None:
        self.in_flight = 0  # requests inside, queued ones included
        self.last_used_at_ms = last_used_at_ms
        self.uses = 0  # requests since it came; only grows

    def __repr__(self) -> str:
        return (
            f"Use(in_flight={self.in_flight}, uses={self.uses}, "
            f"last_used_at_ms={self.last_used_at_ms})"
        )
