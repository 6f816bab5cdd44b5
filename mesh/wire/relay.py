"""Pass-through of calls by frames: what the router does with every inference request.

The relay owns bytes, streams, windows, retained request bytes and deadlines; a ``Dispatcher`` (the
router) owns every decision. A message is never parsed: the model's name is peeked at in the first
bytes (``mesh.wire.peek``) when no header names it, header blocks are spliced out of cached pieces,
and DATA leaves as it came, cut as it came.

The request's bytes are held until the first byte of a reply has been passed on, as long as they fit
into ``held_bytes_max`` a call; so a refusal or a dead instance costs the client nothing. Back-
pressure: what one side does not take is not credited to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mesh.core.errors import InvalidArgument, MeshError, ResourceExhausted
from mesh.wire import hpack
from mesh.wire.head import RequestHead
from mesh.wire.limits import Limits
from mesh.wire.outbound import Outbound
from mesh.wire.relay_call import RelayCall
from mesh.wire.relay_rpcs import ConfiguredCall, Rpcs
from mesh.wire.relay_up import RelayUp
from mesh.wire.stream import Stream
from mesh.wire.upstream import Failure, Upstream

__all__ = ["Dispatcher", "Failure", "HeldBudget", "Relay", "RelayCall", "Rpcs", "Upstream"]


@dataclass(slots=True)
class HeldBudget:
    """Bytes that all calls of this process keep, and the bound on them.

    ``used_bytes`` are held requests, exact; ``queued_bytes`` wait for peers to read them, as of the
    last tick of the loop's pump (``Relay.note_queued``).
    """

    max_bytes: int
    used_bytes: int = 0
    queued_bytes: int = 0


class Dispatcher(Protocol):
    """Called in the event loop, synchronously; must not block."""

    def route(self, call: RelayCall) -> None:
        """The model's name is known. Now or later call ``forward`` or ``fail`` once."""
        ...

    def check_vmodel(self, name: str, known: Callable[[MeshError | None], None]) -> None:
        """Call ``known``, now or later, with None when there is a vmodel of that name, else with
        the error. Asked before ``route``, for methods whose messages are said to name one."""
        ...

    def failed(self, call: RelayCall, upstream: Upstream, failure: Failure) -> None:
        """An attempt ended before a reply byte was passed on. ``forward`` elsewhere, or ``fail``.

        Not called when the call may not be retried after this failure: then the relay has failed
        it with UNAVAILABLE by itself.
        """
        ...

    def done(self, call: RelayCall, code: int, now_s: float) -> None:
        """The call is over, with this gRPC status (1 when the client cancelled).

        Called exactly once for each call that ``route`` saw; the call's counts are final.
        """
        ...


def _too_full(budget: HeldBudget) -> MeshError:
    return ResourceExhausted(
        f"this router keeps {budget.used_bytes + budget.queued_bytes} bytes for clients that wait "
        f"or do not read, over its bound of {budget.max_bytes}; retry shortly",
        retry_after_ms=1_000,
    )


class Relay:
    """Takes every call whose path the server has no method for (``Server(fallback=relay)``).

    ``idempotent`` paths may be retried after delivery, until a byte of a reply was passed on.
    ``peek`` paths take the model from field 1 of the first message when no header names it; other
    paths must name it by header. ``rpcs``, where given, says so of each method instead.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        peek: frozenset[str],
        idempotent: frozenset[str],
        limits: Limits,
        held_bytes_max: int = 256 * 1024,
        rpcs: Rpcs | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.peek = peek
        self.idempotent = idempotent
        self.limits = limits
        self.rpcs = rpcs  # may be replaced by others while it runs, but not by None
        self._call: type[RelayCall] = RelayCall if rpcs is None else ConfiguredCall
        self.held_bytes_max = max(held_bytes_max, limits.stream_window_bytes)
        self.budget = HeldBudget(limits.max_buffered_bytes_total)

    def new_stream(
        self, conn: Outbound, stream_id: int, head: RequestHead, end: bool
    ) -> Stream | None:
        """``Server`` calls this for a path that none of its methods has."""
        call = self._call(conn, stream_id, head, self)
        call.remote_closed = end
        conn.streams[stream_id] = call
        call._request_ended = end
        budget = self.budget
        if budget.queued_bytes + budget.used_bytes > budget.max_bytes:
            call._end_unrouted(_too_full(budget))
            return call
        call.begin()
        if end and call._peeking:
            call._end_unrouted(InvalidArgument("the request ended before its message did"))
        return call

    def note_queued(self, queued_bytes: int) -> None:
        """What waits for peers to read it, in all of this process (``Pump.on_tick``)."""
        self.budget.queued_bytes = queued_bytes

    def request_prefix(self, head: RequestHead) -> bytes:
        """The header block of a relayed request but for model and time-out."""
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", head.path.encode()),
            (b":authority", head.authority or b"mesh"),
            (b"te", b"trailers"),
            (b"content-type", head.content_type),
        ]
        if head.encoding != b"identity":
            fields.append((b"grpc-encoding", head.encoding))
        fields += head.metadata
        name = head.vmodel_id if head.vmodel_id is not None else head.model_id
        if name is not None:
            fields.append((b"mm-vmodel-id", name.encode()))
        return hpack.encode(fields)

    def attempt_over(self, up: RelayUp) -> None:
        """An attempt was called off."""
        up.upstream.inflight -= 1
        if up.conn.going_away:
            up.upstream.stream_ended(up.conn)

    def deadline_message(self, call: RelayCall) -> str:
        if not call._routed:
            return "the deadline passed before the request had named a model"
        if call._up is None:
            return f"the deadline passed while the request waited for model {call.model_name!r}"
        return (
            f"the deadline passed while the instance at {call._up.upstream.address} worked on "
            f"model {call.model_name!r}"
        )
