"""One client call that is being relayed: its bytes, its deadline, its attempts.

The request's bytes are held until the first byte of a reply has been passed on, as long as they fit
into ``held_bytes_max`` a call; so a refusal or a dead instance costs the client nothing. Back-
pressure: what one side does not take is not credited to the other.

Fails a call by itself only when nobody else can help it: no model is named, its deadline has
passed, or an attempt failed that must not be repeated (delivered and not idempotent, or no longer
held). Everything else is the dispatcher's to decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mesh.core.errors import DeadlineExceeded, InvalidArgument, MeshError, Unavailable
from mesh.wire import hpack, messages
from mesh.wire.frames import ErrorCode
from mesh.wire.head import RequestHead, format_timeout
from mesh.wire.messages import PREFIX_BYTES
from mesh.wire.outbound import Outbound
from mesh.wire.peek import peek_model_name
from mesh.wire.peer import NoConnection, Unconnected
from mesh.wire.relay_up import WIDEN_BYTES, RelayUp
from mesh.wire.stream import Buffer, Stream
from mesh.wire.upstream import Failure, Upstream

if TYPE_CHECKING:
    from mesh.wire.relay import Relay

_CANCELLED: Final = 1
# After these an instance may have carried the call out.
_DELIVERED: Final = frozenset({Failure.LOST, Failure.SILENT})
_NO_CONNECTION: Final = {
    Unconnected.FAILED: Failure.CONNECT,
    Unconnected.CLOSED: Failure.CONNECT,
    Unconnected.SILENT: Failure.CONNECT,
    Unconnected.FULL: Failure.OVERLOADED,
}
_NEVER: Final = float("inf")
# A deadline is passed on as it came unless the call has waited longer than this.
_WAITED_S: Final = 0.001
# Held pieces are joined at this number: tiny ones would take many times their bytes.
_HELD_PIECES_MAX: Final = 64


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

    _name_in = staticmethod(peek_model_name)

    # ------------------------------------------------------------------ from the client

    def begin(self) -> None:
        """The headers are there. Route at once when they name the model."""
        head, relay = self.head, self._relay
        name = head.vmodel_id if head.vmodel_id is not None else head.model_id
        if name is None and head.path in relay.peek:
            self._peeking = True
            return
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
            name, whole = self._name_in(
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
        self._route()

    def _route(self) -> None:
        self._routed = True
        self._relay.dispatcher.route(self)

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
            if sent >= WIDEN_BYTES and self.queue is None and not self.wide:
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

        def on_ready(ready: Outbound | NoConnection) -> None:
            if self._finished:
                upstream.inflight -= 1
            elif isinstance(ready, NoConnection):
                upstream.inflight -= 1
                self._attempt_failed(upstream, _NO_CONNECTION[ready.why])
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

    def may_retry(self, failure: Failure) -> bool:
        """Whether it may be sent again after such a failure, when no byte of a reply has come."""
        return self._held is not None and (
            failure not in _DELIVERED or self.head.path in self._relay.idempotent
        )

    def _attempt_failed(self, upstream: Upstream, failure: Failure) -> None:
        """No byte of a reply was passed on: may it be tried again?"""
        if self.may_retry(failure):
            self._relay.dispatcher.failed(self, upstream, failure)
        else:
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

    def _finish(self, code: int) -> None:
        if self._finished:
            return
        self._finished = True
        if self._held is not None:
            self._drop_held()
        if self._routed:
            self._relay.dispatcher.done(self, code, self.conn.now_s)


def messages_too_much(limit: int) -> MeshError:
    """A call that waits has sent more than can be held for it."""
    return Unavailable(
        f"the model is not in memory and more than {limit} bytes of the request would have to be "
        "held while it loads; retry shortly",
        retry_after_ms=1_000,
    )
