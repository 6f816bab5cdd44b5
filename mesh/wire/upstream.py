"""What a router sends calls to: one instance, and the ways in which an attempt on it can fail."""

from __future__ import annotations

from enum import Enum
from typing import Final

from mesh.wire.limits import INSIDE, Limits
from mesh.wire.peer import Peer


class Failure(Enum):
    """Why an attempt ended before any byte of a reply was passed on."""

    CONNECT = "connect"  # never reached the instance
    REFUSED = "refused"  # REFUSED_STREAM, or GOAWAY below this stream: never delivered
    LOST = "lost"  # the connection broke or the stream was reset after delivery
    SILENT = "silent"  # the instance answers no PING; taken off it, where a retry is safe
    NOT_HERE = "not-here"  # mesh-error of the instance
    DRAINING = "draining"
    OVERLOADED = "overloaded"


MESH_ERRORS: Final = {
    b"not-here": Failure.NOT_HERE,
    b"draining": Failure.DRAINING,
    b"overloaded": Failure.OVERLOADED,
}


class Upstream(Peer):
    """The connections of this router to one instance. ``inflight`` counts the calls on them."""

    def __init__(self, address: str, *, limits: Limits = INSIDE) -> None:
        super().__init__(address, limits=limits)
        self.inflight = 0
