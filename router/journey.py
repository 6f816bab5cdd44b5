"""A call that was not one plain hit: what it tried, and what it waits for."""

from __future__ import annotations

from router.calls import Call
from router.loads import Waiter
from router.routes import CopyRoute


class Journey:
    """``Call.context`` of such a call, from its first miss or failure to its end."""

    __slots__ = (
        "call",
        "copy",
        "excluded",
        "failures",
        "misses",
        "model_id",
        "over",
        "overloads",
        "parked_until_s",
        "parks",
        "rested",
        "unreachable",
        "waiter",
    )

    def __init__(self, call: Call) -> None:
        self.call = call
        self.model_id = ""
        self.copy: CopyRoute | None = None
        self.excluded: set[str] = set()  # not to be sent there again
        self.unreachable: set[str] = set()  # nor to be asked to load
        self.failures = 0  # attempts that were delivered, or should have been, and got no answer
        self.overloads = 0
        self.misses = 0
        self.waiter: Waiter | None = None
        self.parks = 0
        self.parked_until_s = 0.0
        self.rested = False  # it has just been parked
        self.over = False  # the client went away, or the deadline passed, while we were waiting
