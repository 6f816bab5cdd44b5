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

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol

from mesh.core.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    MeshError,
    ResourceExhausted,
    Unavailable,
)
from mesh.wire import hpack, messages
from mesh.wire.frames import ErrorCode
from mesh.wire.head import ReplyHead, RequestHead, format_timeout
from mesh.wire.limits import INSIDE, Limits
from mesh.wire.messages import PREFIX_BYTES
from mesh.wire.outbound import Outbound
from mesh.wire.peek import peek_model_name
from mesh.wire.peer import Peer
from mesh.wire.stream import Buffer, Stream

_CANCELLED: Final = 1
# A stream that has moved so much is a large one.
_WIDEN_BYTES: Final = 32 * 1024
_UNAVAILABLE: Final = 14
_NEVER: Final = float("inf")
# A deadline is passed on as it came unless the call has waited longer than this.
_WAITED_S: Final = 0.001
# Held pieces are joined at this number: tiny ones would take many times their bytes.
_HELD_PIECES_MAX: Final = 64


class Failure(Enum):
    """Why an attempt ended before any byte of a reply was passed on."""

    CONNECT = "connect"  # never reached the instance
    REFUSED = "refused"  # REFUSED_STREAM, or GOAWAY below this stream: never delivered
    LOST = "lost"  # the connection broke or the stream was reset after delivery
    NOT_HERE = "not-here"  # mesh-error of the instance
    DRAINING = "draining"
    OVERLOADED = "overloaded"


_MESH_ERRORS: Final = {
    b"not-here": Failure.NOT_HERE,
    b"draining": Failure.DRAINING,
    b"overloaded": Failure.OVERLOADED,
}


class Upstream(Peer):
    """The connections of this router to one instance. ``inflight`` counts the calls on them."""

    def __init__(self, address: str, *, limits: Limits = INSIDE) -> None:
        super().__init__(address, limits=limits)
        self.inflight = 0


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


class RelayCall(Stream):
    """One client call that is being relayed; also the client's stream.

    ``model_name`` is what the client asked for. ``context`` belongs to the dispatcher. ``attempts``
    counts forwards. Byte counts are those of the gRPC bodies.
    """

    __slots__ = (
        "_credited",
        "_finished",
        "_held",
        "_held_bytes",
        "_peek_again_bytes",
        "_peeking",
        "_relay",
        "_reply_started",
        "_request_ended",
        "_routed",
        "_up",
        "attempts",
        "by_header",
        "context",
        "head",
        "model_name",
        "peeked_whole",
        "request_bytes",
        "response_bytes",
    )

    def __init__(self, conn: Outbound, stream_id: int, head: RequestHead, relay: Relay) -> None:
        super().__init__(conn, stream_id)
        self.head = head
        self.context: Any = None
        self.model_name = ""
        self.by_header = False
        self.peeked_whole = True
        self.attempts = 0
        self.request_bytes = 0
        self.response_bytes = 0
        self._relay = relay
        self._up: RelayUp | None = None
        self._held: list[bytes] | None = []
        self._held_bytes = 0
        self._credited = 0
        self._request_ended = False
        self._reply_started = False
        self._finished = False
        self._routed = False
        self._peeking = False
        self._peek_again_bytes = 0
        if head.timeout_s is not None:
            self.deadline_s = conn.now_s + head.timeout_s

    # ------------------------------------------------------------------ from the client

    def begin(self) -> None:
        """The headers are there. Route at once when they name the model."""
        head, relay = self.head, self._relay
        name = head.vmodel_id if head.vmodel_id is not None else head.model_id
        if name is None and head.path in relay.peek:
            self._peeking = True
            return
        self.by_header = True
        if name is None:
            self._end_unrouted(InvalidArgument("must include mm-model-id header"))
        elif head.model_id is not None and head.vmodel_id is not None:
            self._end_unrouted(InvalidArgument("mm-model-id and mm-vmodel-id cannot both be given"))
        elif not name:
            self._end_unrouted(InvalidArgument("the model id in the header is empty"))
        else:
            self.model_name = name
            self._routed = True
            relay.dispatcher.route(self)

    def on_data(self, data: Buffer, end: bool) -> None:
        size = len(data)
        self.request_bytes += size
        if self._finished:
            self.consume(size)
            return
        self._request_ended = end
        held = self._held
        if held is not None:
            budget = self._relay.budget
            if (
                self._held_bytes + size <= self._relay.held_bytes_max
                and budget.used_bytes + size <= budget.max_bytes
            ):
                budget.used_bytes += size
                data = data if type(data) is bytes else bytes(data)
                held.append(data)
                self._held_bytes += size
                if not end and len(held) >= _HELD_PIECES_MAX:
                    held[:] = [b"".join(held)]
            elif self._up is None:  # nowhere to send it: the client's window is what stops it
                self.fail(messages_too_much(self._relay.held_bytes_max))
                return
            else:
                self._drop_held()
        up = self._up
        if up is not None:
            if up.send_data(data, end):
                up.sent += size
                if not end:
                    self._credit(up.sent)
        elif self._peeking:
            self._peek()

    def on_data_run(self, pieces: list[Buffer], total: int) -> None:
        up = self._up
        if self._held is None and up is not None and up.send_run(pieces, total):
            self.request_bytes += total
            up.sent += total
            self._credit(up.sent)
        else:
            super().on_data_run(pieces, total)

    def _drop_held(self) -> None:
        if self._held is not None:
            self._held = None
            self._relay.budget.used_bytes -= self._held_bytes
            self._held_bytes = 0

    def _peek(self) -> None:
        """Look for the model's name in what has come so far."""
        held = self._held or []
        relay = self._relay
        window = relay.limits.stream_window_bytes
        if self._held_bytes < self._peek_again_bytes and not self._request_ended:
            return
        data = held[0] if len(held) == 1 else b"".join(held)
        try:
            name, whole = peek_model_name(
                data,
                self.head.encoding,
                relay.limits.max_message_bytes,
                ended=self._request_ended,
            )
        except MeshError as error:
            self._end_unrouted(error)
            return
        if name is None:
            if len(data) >= PREFIX_BYTES:
                # Next time when the message is whole, the window full, or twice as much is here:
                # a name that comes drop by drop is not looked for at each drop.
                whole_bytes = PREFIX_BYTES + int.from_bytes(data[1:PREFIX_BYTES], "big")
                self._peek_again_bytes = min(whole_bytes, window, 2 * len(data))
            if len(data) >= window:
                self._end_unrouted(
                    InvalidArgument(
                        f"model_name is not within the first {len(data)} bytes of the request: "
                        "send it first, or name the model by the header mm-model-id"
                    )
                )
            return
        self._peeking = False
        self.model_name = name
        self.peeked_whole = whole
        self._routed = True
        relay.dispatcher.route(self)

    def _end_unrouted(self, error: MeshError) -> None:
        self._peeking = False
        self.fail(error)

    def waits_for_prefix(self) -> bool:
        return not self._finished and not self._request_ended and self.request_bytes < PREFIX_BYTES

    def on_reset(self, code: int) -> None:
        """The client cancelled, or its connection is gone."""
        up = self._detach()
        if up is not None:
            up.reset(ErrorCode.CANCEL)
            self._relay.attempt_over(up)
        self._finish(_CANCELLED)

    def on_deadline(self) -> None:
        self.deadline_s = _NEVER
        if not self._finished:
            self.fail(DeadlineExceeded(self._relay.deadline_message(self)))
        elif self.queue is not None:
            self.reset(ErrorCode.CANCEL)

    def on_drained(self, sent: int) -> None:
        """The client has taken ``sent`` more bytes of the reply."""
        if self._up is not None:
            self._up.consume(sent)

    def _credit(self, sent: int) -> None:
        """The instance has been sent ``sent`` bytes: let the client send as many more.

        But not before the instance has accepted the call, which it says by enlarging the window of
        its first bytes: until then all that has come is held, so that a refusal costs nothing.
        """
        if sent > self._credited and (self._held is None or self._accepted()):
            self.consume(sent - self._credited)
            self._credited = sent
            if sent >= _WIDEN_BYTES and self.queue is None and not self.wide:
                self._widen(self)

    def _widen(self, stream: Stream) -> None:
        """A large request (``stream`` is this) or reply flows: widen its window, if the client's
        connection may have that much more under way."""
        conn = self.conn
        limits = conn.limits
        wide_bytes = limits.wide_window_bytes
        for other in conn.streams.values():
            if other.wide:
                wide_bytes += limits.wide_window_bytes
            if isinstance(other, RelayCall):
                up = other._up
                wide_bytes += (
                    limits.wide_window_bytes if up is not None and up.wide else other.queued_bytes
                )
        if wide_bytes <= limits.max_wide_bytes_per_connection:
            stream.grow_window(limits.wide_window_bytes)

    def _accepted(self) -> bool:
        up = self._up
        if up is None:
            return False
        initial = up.conn.peer_initial_window
        # A server with a large window of its own may never say so.
        return initial > self._relay.held_bytes_max or up.send_window + up.sent > initial

    # ------------------------------------------------------------------ from the dispatcher

    def forward(self, upstream: Upstream, model_id_field: bytes) -> None:
        """Send (again) to ``upstream``.

        ``model_id_field`` is ``hpack.encode_literal(b"mm-model-id", id)``, made once a model.
        """
        if self._finished:
            return
        self.attempts += 1
        upstream.inflight += 1
        conn = upstream.current
        if conn is not None and conn.can_open:
            self._start(conn, upstream, model_id_field)
        else:
            self._await_connection(upstream, model_id_field)

    def _await_connection(self, upstream: Upstream, model_id_field: bytes) -> None:
        """No connection can take a stream now: one is made, or its failure tells."""

        def on_ready(ready: Outbound | None, _reason: str) -> None:
            if self._finished:
                upstream.inflight -= 1
            elif ready is None:
                upstream.inflight -= 1
                self._attempt_failed(upstream, Failure.CONNECT)
            else:
                self._start(ready, upstream, model_id_field)

        upstream.acquire(on_ready)

    def _start(self, conn: Outbound, upstream: Upstream, model_id_field: bytes) -> None:
        """Open the stream to the instance and send what has been held."""
        head = self.head
        up = RelayUp(conn, conn._next_stream, self, upstream)
        conn.streams[up.id] = up
        conn._next_stream += 2
        self._up = up
        prefix = head.relay_prefix
        if prefix is None:
            prefix = head.relay_prefix = self._relay.request_prefix(head)
        block = prefix + model_id_field
        if head.timeout_s is not None:
            block += self._timeout_field(conn.now_s)
        if self._peeking or not self.peeked_whole:
            block += hpack.encode_literal(b"mesh-peeked-name", self.model_name.encode())
        conn.send_headers(up, block, False)
        held = self._held
        if self._request_ended and held is not None and len(held) == 1:  # all in one frame
            if up.send_data(held[0], True):
                up.sent = self._held_bytes
            return
        self._send_held(up, held or [])

    def _send_held(self, up: RelayUp, held: list[bytes]) -> None:
        """What has come so far, in pieces."""
        last = len(held) - 1
        for index, piece in enumerate(held):
            up.send_data(piece, self._request_ended and index == last)
        if not held and self._request_ended:
            up.send_data(b"", True)
        up.sent = self._held_bytes - up.queued_bytes
        if not self._request_ended:
            self._credit(up.sent)

    def _timeout_field(self, now_s: float) -> bytes:
        """What is left of the deadline, for the instance."""
        head = self.head
        left_s = self.deadline_s - now_s
        if head.timeout_s is not None and head.timeout_s - left_s < _WAITED_S:
            value = head.get(b"grpc-timeout")
            if value is not None:
                return hpack.encode_literal(b"grpc-timeout", value)
        return hpack.encode_literal(b"grpc-timeout", format_timeout(max(left_s, 0.0)))

    def fail(self, error: MeshError) -> None:
        """End the call with the status of ``error``."""
        if self._finished:
            return
        up = self._detach()
        if up is not None:
            up.reset(ErrorCode.CANCEL)
            self._relay.attempt_over(up)
        block = messages.error_trailers(error)
        if self._reply_started:
            self.send_trailers(block)
        else:
            self.send_headers(messages.trailers_only(block), True)
        self._finish(int(error.code))

    @property
    def finished(self) -> bool:
        """The call is over (answered, failed or cancelled)."""
        return self._finished

    # ------------------------------------------------------------------ from the instance

    def _detach(self) -> RelayUp | None:
        up, self._up = self._up, None
        return up

    def _attempt_failed(self, upstream: Upstream, failure: Failure) -> None:
        """No byte of a reply was passed on: may it be tried again?"""
        relay = self._relay
        if self._held is None or (
            failure is Failure.LOST and self.head.path not in relay.idempotent
        ):
            what = "was lost while it worked on" if failure is Failure.LOST else "did not take"
            self.fail(
                Unavailable(
                    f"the instance at {upstream.address} {what} "
                    f"{self.head.path} for model {self.model_name!r} ({failure.value}); "
                    "the request was "
                    + ("too large to be held for a retry" if self._held is None else "delivered")
                    + ", so it is not sent again: retry if that is safe"
                )
            )
        else:
            relay.dispatcher.failed(self, upstream, failure)

    def _finish(self, code: int) -> None:
        if self._finished:
            return
        self._finished = True
        if self._held is not None:
            self._drop_held()
        if self._routed:
            self._relay.dispatcher.done(self, code, self.conn.now_s)


class RelayUp(Stream):
    """The stream of one attempt to an instance."""

    __slots__ = ("call", "sent", "upstream")

    def __init__(self, conn: Outbound, stream_id: int, call: RelayCall, upstream: Upstream) -> None:
        super().__init__(conn, stream_id)
        self.call = call
        self.upstream = upstream
        self.sent = 0

    def on_drained(self, sent: int) -> None:
        self.sent += sent
        if self.call._up is self:
            self.call._credit(self.sent)

    def on_granted(self) -> None:
        if self.call._up is self:
            self.call._credit(self.sent)

    def on_reply(self, head: ReplyHead, end: bool) -> None:
        call = self.call
        if call._up is not self:
            return
        if not end:
            if head.status is not None and head.status < 200:
                return
            if not call._reply_started:
                call._reply_started = True
                call._drop_held()
                if not call._request_ended:
                    call._credit(self.sent)
                block = head.relay_block or _reply_block(head)
                call.conn.send_headers(call, block, False)
            return
        call._up = None
        self.upstream.inflight -= 1
        if not self.local_closed:  # answered before it had the whole request
            self.reset(ErrorCode.NO_ERROR)
        if self.conn.going_away:
            self.upstream.stream_ended(self.conn)
        if head.mesh_error and not call._reply_started:
            failure = _MESH_ERRORS.get(head.mesh_error)
            if failure is not None:
                call._attempt_failed(self.upstream, failure)
                return
        block = head.relay_block or _reply_block(head)
        call.conn.now_s = self.conn.now_s
        status = head.grpc_status
        if status is None:
            call.fail(Internal(f"the instance at {self.upstream.address} sent no grpc-status"))
            return
        call.send_trailers(block)
        call._finish(status)

    def on_data(self, data: Buffer, end: bool) -> None:
        call = self.call
        size = len(data)
        if call._up is not self:
            self.consume(size)
            return
        if end:  # DATA with END_STREAM is no gRPC reply
            if not self.local_closed:
                self.reset(ErrorCode.CANCEL)
            self._over(Failure.LOST)
            return
        call.response_bytes += size
        if call.send_data(data, False):
            self.consume(size)
            if call.response_bytes >= _WIDEN_BYTES and not self.wide:
                call._widen(self)

    def on_data_run(self, pieces: list[Buffer], total: int) -> None:
        call = self.call
        if call._up is self and call.send_run(pieces, total):
            call.response_bytes += total
            self.consume(total)
            if not self.wide:
                call._widen(self)
        else:
            super().on_data_run(pieces, total)

    def on_reset(self, code: int) -> None:
        self._over(Failure.REFUSED if code == ErrorCode.REFUSED_STREAM else Failure.LOST)

    def on_lost(self, reason: str) -> None:
        self._over(Failure.LOST)

    def _over(self, failure: Failure) -> None:
        """The attempt ended without trailers."""
        call = self.call
        if call._up is not self:
            return
        call._up = None
        call._relay.attempt_over(self)
        if call._reply_started:
            call.fail(
                Unavailable(
                    f"the instance at {self.upstream.address} was lost in the middle of its reply"
                )
            )
        else:
            call._attempt_failed(self.upstream, failure)


def messages_too_much(limit: int) -> MeshError:
    """A call that waits has sent more than can be held for it."""
    return Unavailable(
        f"the model is not in memory and more than {limit} bytes of the request would have to be "
        "held while it loads; retry shortly",
        retry_after_ms=1_000,
    )


def _too_full(budget: HeldBudget) -> MeshError:
    return ResourceExhausted(
        f"this router keeps {budget.used_bytes + budget.queued_bytes} bytes for clients that wait "
        f"or do not read, over its bound of {budget.max_bytes}; retry shortly",
        retry_after_ms=1_000,
    )


_DROPPED_REPLY: Final = (b"mesh-", b":")


def _reply_block(head: ReplyHead) -> bytes:
    """The header block for the client: without what is the mesh's own. Cached in the head."""
    fields = [f for f in head.fields if not f[0].startswith(_DROPPED_REPLY)]
    block = hpack.encode(fields)
    if head.status is not None:
        block = hpack.encode([(b":status", b"%d" % head.status)]) + block
    head.relay_block = block
    return block


class Relay:
    """Takes every call whose path the server has no method for (``Server(fallback=relay)``).

    ``idempotent`` paths may be retried after delivery, until a byte of a reply was passed on.
    ``peek`` paths take the model from field 1 of the first message when no header names it; other
    paths must name it by header.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        peek: frozenset[str],
        idempotent: frozenset[str],
        limits: Limits,
        held_bytes_max: int = 256 * 1024,
    ) -> None:
        self.dispatcher = dispatcher
        self.peek = peek
        self.idempotent = idempotent
        self.limits = limits
        self.held_bytes_max = max(held_bytes_max, limits.stream_window_bytes)
        self.budget = HeldBudget(limits.max_buffered_bytes_total)

    def new_stream(
        self, conn: Outbound, stream_id: int, head: RequestHead, end: bool
    ) -> Stream | None:
        """``Server`` calls this for a path that none of its methods has."""
        call = RelayCall(conn, stream_id, head, self)
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
