"""The sending half of a connection, and the life of its streams.

State of both halves is made here; ``mesh.wire.control`` adds the control frames, and
``mesh.wire.connection`` the parser. What is to be sent piles up in ``out`` for the shell to take.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from mesh.wire import frames
from mesh.wire.frames import ErrorCode, ProtocolError, frame_header, pack_header
from mesh.wire.head import ReplyHead, RequestHead
from mesh.wire.hpack import Decoder
from mesh.wire.limits import Limits
from mesh.wire.stream import Buffer, End, Owner, Stream

log = logging.getLogger(__name__)

_RATE_PERIOD_S: Final = 10.0
# Streams that we have reset and whose frames may still be under way.
_FORGOTTEN_MAX: Final = 4_096
# Queued pieces below this are joined: a queue of tiny ones would take many times their bytes.
_PIECE_BYTES: Final = 1_024
_BYTES_PER_CONTROL_FRAME: Final = 32


class Outbound:
    """Windows, queues and streams. ``client`` tells which side we are."""

    def __init__(self, owner: Owner, limits: Limits, *, client: bool, now_s: float = 0.0) -> None:
        self.owner = owner
        self.limits = limits
        self.client = client
        self.now_s = now_s
        self.started_s = now_s
        self.last_read_s = now_s
        self.ping_sent_s = 0.0  # a PING is out that nothing was read behind (``Peer.watch``)
        self.silent = False  # ... and has been for too long
        self.out: list[Buffer] = []
        self.dirty = False
        self.on_dirty: Callable[[Outbound], None] | None = None
        self.streams: dict[int, Stream] = {}
        self.closed = False
        self.error: ProtocolError | None = None
        self.going_away = False  # the peer said GOAWAY, or we did
        self.settings_seen = False
        self.writable = True  # False while the transport's buffer is full
        self.control_backlog = 0  # control bytes queued while not writable
        self.header_backlog = 0  # the same of header blocks

        self.send_window = frames.DEFAULT_WINDOW
        self.peer_initial_window = frames.DEFAULT_WINDOW
        self.peer_max_frame = frames.DEFAULT_FRAME_BYTES
        self.peer_max_streams = 100 if client else 0
        self.granted = frames.DEFAULT_WINDOW  # connection window that the peer gave us, in all
        announced = limits.stream_window_bytes
        self.stream_window = max(announced, frames.DEFAULT_WINDOW)
        self.recv_window = frames.DEFAULT_WINDOW
        # Received bytes are given back to the peer's windows in steps of half a window: every
        # WINDOW_UPDATE wakes the peer, and one that is too small makes it send crumbs.
        self._streams_max = limits.max_concurrent_streams
        self.credit_step = max(1, announced // 2)
        self._conn_credit_step = max(1, limits.connection_window_bytes // 4)
        self._recv_credit = 0
        self.last_peer_stream = 0
        self._next_stream = 1 if client else 2
        self._blocked: dict[Stream, None] = {}
        self._forgotten: OrderedDict[int, None] = OrderedDict()

        self._decoder = Decoder(
            limits.hpack_table_bytes,
            max_list_bytes=limits.max_header_list_bytes,
            max_fields=limits.max_header_fields,
            max_value_bytes=limits.max_header_value_bytes,
        )
        self._heads: dict[bytes, RequestHead | ReplyHead] = {}
        self._heads_bytes = 0
        self._block_prefix = b""  # table size update owed to the peer's decoder

        self._tail = b""
        self._preface_left = b"" if client else frames.PREFACE
        self._data_stream: Stream | None = None  # of the DATA frame whose payload is not complete
        self._data_left = 0
        self._data_padding = 0
        self._data_flags = 0
        self._continued: tuple[int, int, bytearray] | None = None  # stream, flags, block so far
        self._continuations = 0
        self.header_block_since_s = 0.0  # a header block is being continued since then
        self._rates: dict[str, list[float]] = {}
        self._drain_ping = b""
        self._start()

    def _start(self) -> None:
        limits = self.limits
        values = {
            frames.SETTINGS_HEADER_TABLE_SIZE: limits.hpack_table_bytes,
            frames.SETTINGS_INITIAL_WINDOW_SIZE: (limits.stream_window_bytes),
            frames.SETTINGS_MAX_FRAME_SIZE: limits.max_frame_bytes,
            frames.SETTINGS_MAX_HEADER_LIST_SIZE: limits.max_header_list_bytes,
        }
        if self.client:
            self.out.append(frames.PREFACE)
            values[frames.SETTINGS_ENABLE_PUSH] = 0
        else:
            values[frames.SETTINGS_MAX_CONCURRENT_STREAMS] = limits.max_concurrent_streams
        self.out.append(frames.settings(values))
        extra = limits.connection_window_bytes - self.recv_window
        if extra > 0:
            self.out.append(frames.window_update(0, extra))
            self.recv_window += extra

    # ------------------------------------------------------------------ output

    def mark_dirty(self) -> None:
        self.dirty = True
        if self.on_dirty is not None:
            self.on_dirty(self)

    def control(self, frame: bytes) -> None:
        """Queue a control frame; a peer that reads none of them loses the connection."""
        self.out.append(frame)
        if not self.dirty:
            self.mark_dirty()
        if not self.writable:
            self.control_backlog += len(frame)
            if self.control_backlog > self.limits.max_control_output_bytes:
                self.terminate(ErrorCode.ENHANCE_YOUR_CALM, "control frames are not being read")

    def take_output(self) -> list[Buffer]:
        """Everything to be written, in order; empties ``out``."""
        out = self.out
        self.out = []
        self.dirty = False
        return out

    def send_headers(self, stream: Stream, block: bytes, end: bool) -> None:
        if self._block_prefix:
            block = self._block_prefix + block
            self._block_prefix = b""
        size = len(block)
        out = self.out
        if size <= self.peer_max_frame:
            out.append(
                pack_header(size >> 8, size & 0xFF, frames.HEADERS, 5 if end else 4, stream.id)
                + block
            )
        else:
            step = self.peer_max_frame
            out.append(
                frame_header(step, frames.HEADERS, 1 if end else 0, stream.id) + block[:step]
            )
            for start in range(step, size, step):
                piece = block[start : start + step]
                last = start + step >= size
                out.append(
                    frame_header(len(piece), frames.CONTINUATION, 4 if last else 0, stream.id)
                    + piece
                )
        if not self.dirty:
            self.mark_dirty()
        if not self.writable:
            self.header_backlog += size
            if self.header_backlog > self.limits.max_buffered_bytes_per_connection:
                self.terminate(ErrorCode.ENHANCE_YOUR_CALM, "replies are not being read")
                return
        if end:
            self.close_local(stream)

    def enqueue(self, stream: Stream, data: Buffer, end: bool) -> bool:
        """The slow half of ``Stream.send_data``: queue behind the windows, send what they allow."""
        queue = stream.queue
        if queue is None:
            queue = stream.queue = deque()
            stream.progress_s = self.now_s
        if len(data):
            _append(queue, data)
            stream.queued_bytes += len(data)
        if end:
            queue.append(End(None))
        self._blocked[stream] = None
        before = stream.queued_bytes
        self._send_queued(stream, notify=False)
        if before != stream.queued_bytes:
            stream.on_drained(before - stream.queued_bytes)
        return False

    def _send_queued(self, stream: Stream, *, notify: bool = True) -> None:
        """Send of a stream's queue what its windows allow."""
        queue = stream.queue
        if queue is None:
            self._blocked.pop(stream, None)
            return
        sent = 0
        while queue and self.writable:
            item = queue[0]
            if isinstance(item, End):
                queue.clear()
                stream.queue = None
                if item.block is not None:
                    self.send_headers(stream, item.block, True)
                else:
                    self.out.append(frame_header(0, frames.DATA, frames.END_STREAM, stream.id))
                    if not self.dirty:
                        self.mark_dirty()
                    self.close_local(stream)
                break
            room = min(stream.send_window, self.send_window, self.peer_max_frame, len(item))
            if room <= 0:
                break
            if room == len(item):
                piece = item
                queue.popleft()
            else:
                piece = item[:room]
                queue[0] = item[room:]
            self.out.append(frame_header(room, frames.DATA, 0, stream.id))
            self.out.append(piece)
            stream.send_window -= room
            self.send_window -= room
            sent += room
        if not queue:
            stream.queue = None
            self._blocked.pop(stream, None)
        if sent:
            stream.queued_bytes -= sent
            stream.progress_s = self.now_s
            if not self.dirty:
                self.mark_dirty()
            if notify:
                stream.on_drained(sent)

    def resume(self) -> None:
        """The transport has room, or the connection's window grew: serve who waits, in turn."""
        if not self.writable:
            return
        self.control_backlog = self.header_backlog = 0
        for stream in list(self._blocked):
            if not self.writable:
                break
            if self.send_window <= 0 and stream.queued_bytes:
                continue  # only ends of streams need no window
            # to the back of the row, so that none is served first for ever
            self._blocked.pop(stream, None)
            self._blocked[stream] = None
            self._send_queued(stream)

    def settle(self, older_s: float) -> None:
        """Let go of the read buffers that streams hold which have not moved since ``older_s``."""
        for stream in self._blocked:
            queue = stream.queue
            if queue is None or stream.progress_s > older_s:
                continue
            for index, item in enumerate(queue):
                if type(item) is memoryview and type(item.obj) is bytearray:
                    queue[index] = memoryview(bytes(item))

    # ------------------------------------------------------------------ streams

    def open_stream(self, make: Callable[[Outbound, int], Stream]) -> Stream:
        """Client side: take the next stream id."""
        stream = make(self, self._next_stream)
        self.streams[self._next_stream] = stream
        self._next_stream += 2
        return stream

    def add(self, stream: Stream, *, remote_closed: bool) -> None:
        """Server side, from ``Owner.new_stream``: the stream exists from now on."""
        stream.remote_closed = remote_closed
        self.streams[stream.id] = stream

    @property
    def can_open(self) -> bool:
        return (
            not self.closed
            and not self.going_away
            and self.settings_seen
            and len(self.streams) < self.peer_max_streams
            and self._next_stream < frames.MAX_STREAM_ID
        )

    def close_local(self, stream: Stream) -> None:
        """We have ended our half."""
        stream.local_closed = True
        if stream.remote_closed:
            self.streams.pop(stream.id, None)
        elif not self.client:
            # A reply that is complete before its request: the rest of the request is not wanted.
            self.reset(stream, ErrorCode.NO_ERROR)

    def _close_remote(self, stream: Stream) -> None:
        stream.remote_closed = True
        if stream.local_closed:
            self.streams.pop(stream.id, None)

    def reset(self, stream: Stream, code: int) -> None:
        if self.streams.pop(stream.id, None) is None:
            return
        stream.queue = None
        self._blocked.pop(stream, None)
        stream.local_closed = True
        if not stream.remote_closed:
            stream.remote_closed = True  # what its owner still consumes is not credited
            self._forget(stream.id)
        self.control(frames.rst_stream(stream.id, code))

    def _forget(self, stream_id: int) -> None:
        """Frames of this stream may still be under way: they are dropped."""
        forgotten = self._forgotten
        forgotten[stream_id] = None
        if len(forgotten) > _FORGOTTEN_MAX:
            forgotten.popitem(last=False)

    def _stream_error(self, stream_id: int, code: ErrorCode) -> None:
        """We end a stream because the peer broke a rule on it; counts as a reset of the peer's."""
        stream = self.streams.get(stream_id)
        if stream is None:
            self._forget(stream_id)
            self.control(frames.rst_stream(stream_id, code))
        else:
            self.reset(stream, code)
            stream.on_reset(code)
        self._count("resets", self.limits.resets_per_10s)

    def _count(self, what: str, limit: int, *, earning: bool = False) -> None:
        """Fail when there is too much of ``what``. ``earning``: beyond what our data explains."""
        rate = self._rates.get(what)
        if rate is None or self.now_s - rate[0] >= _RATE_PERIOD_S:
            self._rates[what] = [self.now_s, 1.0, self._earned() if earning else 0.0]
            return
        rate[1] += 1
        if rate[1] > limit and not (earning and rate[1] - (self._earned() - rate[2]) <= limit):
            raise ProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM, f"more than {limit} {what} in {_RATE_PERIOD_S:g} s"
            )

    def _earned(self) -> float:
        """Control frames that our traffic explains.

        grpcio credits every reply twice and measures the line with pings while data comes.
        """
        streams = (self.last_peer_stream + self._next_stream) / 2
        return 4 * streams + (self.granted - self.send_window) / _BYTES_PER_CONTROL_FRAME

    # ------------------------------------------------------------------ ends

    def terminate(self, code: ErrorCode, message: str) -> None:
        """GOAWAY, and nothing more: the shell writes what is queued and closes."""
        if self.closed:
            return
        self.closed = True
        self.error = ProtocolError(code, message)
        self.out.append(
            frames.goaway(self.last_peer_stream, code, message.encode("utf-8", "replace")[:256])
        )
        if not self.dirty:
            self.mark_dirty()
        self.lose_streams(message)

    def connection_lost(self, reason: str) -> None:
        """The transport is gone."""
        self.closed = True
        self.lose_streams(reason)

    def lose_streams(self, reason: str) -> None:
        streams = list(self.streams.values())
        self.streams.clear()
        self._blocked.clear()
        for stream in streams:
            stream.queue = None
            stream.local_closed = stream.remote_closed = True
            try:
                stream.on_lost(reason)
            except Exception:  # the other streams must hear of it all the same
                log.exception("the loss of stream %d could not be handled", stream.id)

    @property
    def awaits_drain(self) -> bool:
        """The peer may not have seen our first GOAWAY yet."""
        return bool(self._drain_ping) and not self.closed

    def start_drain(self) -> None:
        """Graceful shutdown, first half: no new streams after the peer has seen this."""
        if self.going_away or self.closed:
            return
        self.going_away = True
        if not self.client:
            self._drain_ping = b"mesh-bye"
            self.control(
                frames.goaway(frames.MAX_STREAM_ID, ErrorCode.NO_ERROR)
                + frames.ping(self._drain_ping)
            )


def _append(queue: deque[Buffer | End], data: Buffer) -> None:
    if len(data) < _PIECE_BYTES:
        data = bytes(data)  # a view would keep its whole read buffer
        last = queue[-1] if queue else None
        if type(last) is bytes and len(last) < _PIECE_BYTES:
            queue[-1] = last + data
            return
    else:
        data = memoryview(data)  # to be cut without copying what is left each time
    queue.append(data)
