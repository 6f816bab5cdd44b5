"""The stream of one attempt to an instance: its reply goes to the client frame by frame.

Owned by its ``RelayCall``: whatever ends the attempt before a byte of the reply was passed on is
told to it, and it decides (with the dispatcher) what comes next. An attempt that was called off
hears what still comes and drops it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh.core.errors import Internal, Unavailable
from mesh.wire import hpack
from mesh.wire.frames import ErrorCode
from mesh.wire.head import ReplyHead
from mesh.wire.outbound import Outbound
from mesh.wire.stream import Buffer, Stream
from mesh.wire.upstream import MESH_ERRORS, Failure, Upstream

if TYPE_CHECKING:
    from mesh.wire.relay_call import RelayCall

# A stream that has moved so much is a large one.
WIDEN_BYTES: Final = 32 * 1024


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
            failure = MESH_ERRORS.get(head.mesh_error)
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
            if call.response_bytes >= WIDEN_BYTES and not self.wide:
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

    def on_silent(self) -> None:
        """Go elsewhere if that is safe; otherwise only this instance can answer, if it wakes up."""
        call = self.call
        if call._up is not self or call._reply_started or not call.may_retry(Failure.SILENT):
            return
        self.reset(ErrorCode.CANCEL)
        self._over(Failure.SILENT)

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


_DROPPED_REPLY: Final = (b"mesh-", b":")


def _reply_block(head: ReplyHead) -> bytes:
    """The header block for the client: without what is the mesh's own. Cached in the head."""
    fields = [f for f in head.fields if not f[0].startswith(_DROPPED_REPLY)]
    block = hpack.encode(fields)
    if head.status is not None:
        block = hpack.encode([(b":status", b"%d" % head.status)]) + block
    head.relay_block = block
    return block
