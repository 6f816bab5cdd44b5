"""One HTTP/2 connection, sans I/O: bytes in, calls on streams, bytes out.

``receive`` parses everything that one read brought and calls the streams; what is to be sent piles
up in ``out`` until the shell (``mesh.wire.transport``) takes it. There is no clock, no socket and
no task here. Streams are objects of the owner's making (``Owner.new_stream``), so that a relay or
a handler *is* the stream: no event objects, no queue between.

Flow control. The connection's receive window is refilled as bytes arrive; a stream's window only
when its owner has passed the bytes on (``Stream.consume``), so a slow reader stalls its own stream
and what is buffered is bounded by streams times their window.

Fails: a rule broken by the peer that costs the connection queues a GOAWAY with the code of RFC
9113, sets ``closed`` and tells every stream (``on_lost``). One that costs a stream queues
RST_STREAM and tells that stream.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, Protocol

from mesh.wire import frames
from mesh.wire.frames import ErrorCode, ProtocolError, frame_header, pack_header, unpack_header
from mesh.wire.head import MalformedHead, ReplyHead, RequestHead
from mesh.wire.hpack import Decoder, HeaderListTooLarge, HpackError
from mesh.wire.limits import Limits

Buffer = bytes | memoryview

_CACHE_ENTRIES: Final = 1_024
_CACHE_BYTES: Final = 256 * 1024
_RATE_PERIOD_S: Final = 10.0
# Streams that we have reset and whose frames may still be under way.
_FORGOTTEN_MAX: Final = 4_096
_CREDIT_STEP: Final = 32 * 1024
_NEVER: Final = float("inf")


class Stream:
    """One stream. Owners subclass it and override the ``on_*`` methods.

    ``queue`` holds what the peer's windows did not let through yet, in order: data, and last an
    end marker (trailers, or an empty END_STREAM).
    """

    __slots__ = (
        "conn",
        "deadline_s",
        "empty_frames",
        "id",
        "local_closed",
        "progress_s",
        "queue",
        "queued_bytes",
        "recv_credit",
        "recv_window",
        "remote_closed",
        "send_window",
    )

    def __init__(self, conn: Connection, stream_id: int) -> None:
        self.conn = conn
        self.id = stream_id
        self.send_window = conn.peer_initial_window
        self.recv_window = conn.stream_window
        self.recv_credit = 0
        self.remote_closed = False
        self.local_closed = False
        self.queue: deque[Buffer | _End] | None = None
        self.queued_bytes = 0
        self.empty_frames = 0
        self.deadline_s = _NEVER
        self.progress_s = conn.now_s

    # What the owner overrides.
    def on_data(self, data: Buffer, end: bool) -> None:
        """Part of a DATA frame. ``data`` of a large read is a view: valid as long as it is held."""
        raise NotImplementedError

    def on_reply(self, head: ReplyHead, end: bool) -> None:
        """Client side: initial headers (``end`` False) or trailers (True)."""
        raise NotImplementedError

    def on_trailers(self, head: ReplyHead) -> None:
        """Server side: the request ended with trailers. gRPC has none: they are dropped."""
        self.on_data(b"", True)

    def on_reset(self, code: int) -> None:
        """The peer, or we for a rule that it broke, ended this stream; it is gone already."""
        raise NotImplementedError

    def on_lost(self, reason: str) -> None:
        """The connection is gone."""
        self.on_reset(ErrorCode.CANCEL)

    def on_drained(self, sent: int) -> None:
        """``sent`` queued bytes have left."""

    def on_deadline(self) -> None:
        """``deadline_s`` has passed."""

    # What the owner calls.
    def consume(self, count: int) -> None:
        """``count`` received bytes were passed on: give the peer that much window again."""
        self.recv_credit += count
        if self.recv_credit >= _CREDIT_STEP and not self.remote_closed:
            self.conn.control(frames.window_update(self.id, self.recv_credit))
            self.recv_window += self.recv_credit
            self.recv_credit = 0

    def grow_window(self, size: int) -> None:
        """Let the peer have ``size`` bytes under way on this stream."""
        if not self.remote_closed and size > self.recv_window + self.recv_credit:
            self.consume(size - self.recv_window - self.recv_credit)

    def send_headers(self, block: bytes, end: bool) -> None:
        self.conn.send_headers(self, block, end)

    def send_data(self, data: Buffer, end: bool) -> bool:
        """Send what the windows allow and queue the rest.

        True when all of it left without being queued; else ``on_drained`` tells, now or later, of
        every byte that leaves.
        """
        conn = self.conn
        size = len(data)
        if (
            self.queue is None
            and size <= self.send_window
            and size <= conn.send_window
            and size <= conn.peer_max_frame
            and conn.writable
        ):
            self.send_window -= size
            conn.send_window -= size
            out = conn.out
            out.append(pack_header(size >> 8, size & 0xFF, frames.DATA, 1 if end else 0, self.id))
            if size:
                out.append(data)
            if not conn.dirty:
                conn.mark_dirty()
            if end:
                conn.close_local(self)
            return True
        return conn.enqueue(self, data, end)

    def send_trailers(self, block: bytes) -> None:
        """A header block that ends the stream, behind whatever is queued."""
        if self.queue is None:
            self.conn.send_headers(self, block, True)
        else:
            self.queue.append(_End(block))

    def reset(self, code: int) -> None:
        """End the stream now, both ways. The owner is not called."""
        self.conn.reset(self, code)


class _End:
    """End of a stream behind queued data: trailers, or an END_STREAM of no bytes."""

    __slots__ = ("block",)

    def __init__(self, block: bytes | None) -> None:
        self.block = block


class Owner(Protocol):
    """What stands behind a connection."""

    def new_stream(
        self, conn: Connection, stream_id: int, head: RequestHead, end: bool
    ) -> Stream | None:
        """Server side: a request has come. None refuses it (REFUSED_STREAM)."""
        ...

    def on_goaway(self, conn: Connection) -> None:
        """The peer takes no new streams on this connection."""
        ...

    def on_settings(self, conn: Connection) -> None:
        """The peer's settings are known (its first SETTINGS frame has come, or changed)."""
        ...


class Connection:
    """See the module's docstring. ``client`` tells which side we are."""

    def __init__(self, owner: Owner, limits: Limits, *, client: bool, now_s: float = 0.0) -> None:
        self.owner = owner
        self.limits = limits
        self.client = client
        self.now_s = now_s
        self.started_s = now_s
        self.last_read_s = now_s
        self.out: list[Buffer] = []
        self.dirty = False
        self.on_dirty: Callable[[Connection], None] | None = None
        self.streams: dict[int, Stream] = {}
        self.closed = False
        self.error: ProtocolError | None = None
        self.going_away = False  # the peer said GOAWAY, or we did
        self.settings_seen = False
        self.writable = True  # False while the transport's buffer is full
        self.control_backlog = 0  # control bytes queued while not writable

        self.send_window = frames.DEFAULT_WINDOW
        self.peer_initial_window = frames.DEFAULT_WINDOW
        self.peer_max_frame = frames.DEFAULT_FRAME_BYTES
        self.peer_max_streams = 100 if client else 0
        self.stream_window = max(limits.stream_window_bytes, frames.DEFAULT_WINDOW)
        self.recv_window = frames.DEFAULT_WINDOW
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
            frames.SETTINGS_INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
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
        if end:
            self.close_local(stream)

    def enqueue(self, stream: Stream, data: Buffer, end: bool) -> bool:
        """The slow half of ``Stream.send_data``: queue behind the windows, send what they allow."""
        queue = stream.queue
        if queue is None:
            queue = stream.queue = deque()
            stream.progress_s = self.now_s
        if len(data):
            queue.append(data)
            stream.queued_bytes += len(data)
        if end:
            queue.append(_End(None))
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
            if isinstance(item, _End):
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
        self.control_backlog = 0
        for stream in list(self._blocked):
            if self.send_window <= 0 or not self.writable:
                break
            # to the back of the row, so that none is served first for ever
            self._blocked.pop(stream, None)
            self._blocked[stream] = None
            self._send_queued(stream)

    # ------------------------------------------------------------------ streams

    def open_stream(self, make: Callable[[Connection, int], Stream]) -> Stream:
        """Client side: take the next stream id."""
        stream = make(self, self._next_stream)
        self.streams[self._next_stream] = stream
        self._next_stream += 2
        return stream

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
            forgotten = self._forgotten
            forgotten[stream.id] = None
            if len(forgotten) > _FORGOTTEN_MAX:
                forgotten.popitem(last=False)
        self.control(frames.rst_stream(stream.id, code))

    def _stream_error(self, stream_id: int, code: ErrorCode) -> None:
        """We end a stream because the peer broke a rule on it; counts as a reset of the peer's."""
        stream = self.streams.get(stream_id)
        if stream is None:
            self._forgotten[stream_id] = None
            self.control(frames.rst_stream(stream_id, code))
        else:
            self.reset(stream, code)
            stream.on_reset(code)
        self._count("resets", self.limits.resets_per_10s)

    def _count(self, what: str, limit: int) -> None:
        rate = self._rates.get(what)
        if rate is None or self.now_s - rate[0] >= _RATE_PERIOD_S:
            self._rates[what] = [self.now_s, 1.0]
            return
        rate[1] += 1
        if rate[1] > limit:
            raise ProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM, f"more than {limit} {what} in {_RATE_PERIOD_S:g} s"
            )

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
            stream.on_lost(reason)

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

    # ------------------------------------------------------------------ input

    def receive(self, data: Buffer, now_s: float) -> None:
        """Everything that one read brought."""
        if self.closed:
            return
        self.now_s = self.last_read_s = now_s
        try:
            self._receive(data)
            credit = self._recv_credit
            if credit >= _CREDIT_STEP and not self.closed:
                self._recv_credit = 0
                self.recv_window += credit
                self.control(frames.window_update(0, credit))
        except ProtocolError as error:
            self.terminate(error.code, error.message)

    def _receive(self, data: Buffer) -> None:
        if self._preface_left:
            data = self._preface(data)
        if self._tail:
            data = self._tail + data
            self._tail = b""
        position, end = 0, len(data)
        if self._data_left and end:
            position = self._data_payload(data, 0, end)
        while end - position >= 9:
            high, low, kind, flags, stream_id = unpack_header(data, position)
            length = high << 8 | low
            if length > self.limits.max_frame_bytes:
                raise ProtocolError(
                    ErrorCode.FRAME_SIZE_ERROR, f"frame of {length} bytes is over the limit"
                )
            if self._continued is not None and kind != frames.CONTINUATION:
                raise ProtocolError(
                    ErrorCode.PROTOCOL_ERROR,
                    "a header block is not complete: CONTINUATION expected",
                )
            if stream_id > frames.MAX_STREAM_ID:  # the reserved bit is to be ignored
                stream_id &= frames.MAX_STREAM_ID
            if kind == 0:  # DATA may be cut: its payload is passed on as it comes
                if flags & frames.PADDED and end - position == 9:
                    break  # the pad length is not here yet
                position = self._data_frame(data, position + 9, end, length, flags, stream_id)
            else:
                following = position + 9 + length
                if following > end:
                    break
                payload = data[position + 9 : following]
                position = following
                if kind == 1:
                    if flags & 0x2C == 4:  # END_HEADERS, neither padded nor with priority
                        self._block(stream_id, flags, bytes(payload))
                    else:
                        self._headers(stream_id, flags, bytes(payload))
                else:
                    self._control_frame(kind, flags, stream_id, bytes(payload))
            if self.closed:
                return
        if position < end:
            self._tail = bytes(data[position:])

    def _preface(self, data: Buffer) -> Buffer:
        """Eat the client's connection preface."""
        expected = self._preface_left
        got = bytes(data[: len(expected)])
        if not expected.startswith(got):
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "not an HTTP/2 connection preface")
        self._preface_left = expected[len(got) :]
        return data[len(got) :]

    @property
    def preface_done(self) -> bool:
        return not self._preface_left and self.settings_seen

    def _data_frame(
        self, data: Buffer, position: int, end: int, length: int, flags: int, stream_id: int
    ) -> int:
        """The header of a DATA frame and as much of its payload as is there."""
        stream = self.streams.get(stream_id)
        if flags & frames.PADDED and length == 0:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "padded DATA without pad length")
        if not self.settings_seen:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "the first frame must be SETTINGS")
        self.recv_window -= length
        if self.recv_window < 0:
            raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "connection window overrun")
        self._recv_credit += length
        if stream is None or stream.remote_closed:
            stream = None
            self._data_on_closed(stream_id)
        else:
            stream.recv_window -= length
            if stream.recv_window < 0:
                self._stream_error(stream_id, ErrorCode.FLOW_CONTROL_ERROR)
                stream = None
            elif length == 0 and not flags & 1:
                stream.empty_frames += 1
                if stream.empty_frames > self.limits.empty_data_frames_per_stream:
                    raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "too many empty DATA frames")
        if not flags & frames.PADDED and end - position >= length:  # whole frame at hand
            if stream is not None:
                payload = data[position : position + length]
                if flags & 1:
                    stream.remote_closed = True
                    if stream.local_closed:
                        self.streams.pop(stream_id, None)
                    stream.on_data(payload, True)
                else:
                    stream.on_data(payload, False)
            return position + length
        padding = 0
        if flags & frames.PADDED:
            padding = data[position]
            position += 1
            length -= 1
            if padding > length:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "padding is longer than the frame")
            if stream is not None:
                stream.consume(padding + 1)  # padding is consumed the moment it comes
        self._data_stream = stream
        self._data_left = length
        self._data_padding = padding
        self._data_flags = flags
        if length == 0:
            self._end_of_data(b"")
            return position
        return self._data_payload(data, position, end) if position < end else position

    def _data_payload(self, data: Buffer, position: int, end: int) -> int:
        """More payload of the DATA frame that is under way."""
        take = min(self._data_left, end - position)
        self._data_left -= take
        content = take
        if self._data_left < self._data_padding:  # this piece reaches into the padding
            content = max(0, take - (self._data_padding - self._data_left))
        piece = data[position : position + content]
        if self._data_left == 0:
            self._end_of_data(piece)
        elif content and self._data_stream is not None:
            stream = self._data_stream
            if self.streams.get(stream.id) is stream:
                stream.on_data(piece, False)
        return position + take

    def _end_of_data(self, piece: Buffer) -> None:
        stream, self._data_stream = self._data_stream, None
        self._data_padding = 0
        if stream is None or self.streams.get(stream.id) is not stream:
            return
        if self._data_flags & 1:
            self._close_remote(stream)
            stream.on_data(piece, True)
        elif len(piece):
            stream.on_data(piece, False)

    def _data_on_closed(self, stream_id: int) -> None:
        if stream_id == 0 or self._is_idle(stream_id):
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"DATA on idle stream {stream_id}")
        if stream_id not in self._forgotten:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, f"DATA on closed stream {stream_id}")

    def _is_idle(self, stream_id: int) -> bool:
        ours = (stream_id & 1 == 1) == self.client
        return stream_id >= self._next_stream if ours else stream_id > self.last_peer_stream

    def _headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        """HEADERS with padding, priority, or to be continued."""
        if flags & frames.PADDED:
            if not payload or payload[0] >= len(payload):
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "padding is longer than the frame")
            payload = payload[1 : len(payload) - payload[0]]
        if flags & frames.HAS_PRIORITY:
            if len(payload) < 5:
                raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for priority")
            if frames.parse_u32(payload) & frames.MAX_STREAM_ID == stream_id:
                self._priority_on_itself(stream_id)
            payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._block(stream_id, flags, payload)
            return
        if stream_id == 0:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "HEADERS on stream 0")
        self._continued = (stream_id, flags, bytearray(payload))
        self.header_block_since_s = self.now_s
        self._continuations = 0

    def _priority_on_itself(self, stream_id: int) -> None:
        raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} depends on itself")

    def _continuation(self, stream_id: int, flags: int, payload: bytes) -> None:
        if self._continued is None or self._continued[0] != stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        _, first_flags, block = self._continued
        self._continuations += 1
        block += payload
        limits = self.limits
        if (
            self._continuations > limits.max_continuation_frames
            or len(block) > 2 * limits.max_header_list_bytes + limits.max_frame_bytes
        ):
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "header block is too long")
        if flags & frames.END_HEADERS:
            self._continued = None
            self.header_block_since_s = 0.0
            self._block(stream_id, first_flags, bytes(block))

    def _block(self, stream_id: int, flags: int, block: bytes) -> None:
        """A complete header block."""
        if not self.settings_seen:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "the first frame must be SETTINGS")
        stream = self.streams.get(stream_id)
        head = self._heads.get(block)
        if head is None:
            trailers = self.client or stream is not None or stream_id in self._forgotten
            head = self._decode(stream_id, block, as_reply=trailers)
            if head is None:
                return
        if self.client:
            if stream is None or stream.remote_closed:
                self._headers_on_closed(stream_id)
            elif type(head) is ReplyHead:
                if flags & 1:
                    stream.remote_closed = True
                    if stream.local_closed:
                        self.streams.pop(stream_id, None)
                    stream.on_reply(head, True)
                else:
                    stream.on_reply(head, False)
        elif stream is not None:
            self._request_trailers(stream, block, flags)
        elif type(head) is RequestHead:
            self._request(stream_id, flags, head)
        elif stream_id not in self._forgotten:
            self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)

    def _request(self, stream_id: int, flags: int, head: RequestHead) -> None:
        if stream_id <= self.last_peer_stream or not stream_id & 1:
            if stream_id in self._forgotten:
                return
            code = ErrorCode.STREAM_CLOSED if stream_id & 1 else ErrorCode.PROTOCOL_ERROR
            raise ProtocolError(code, f"HEADERS on stream {stream_id}, which cannot be opened")
        self.last_peer_stream = stream_id
        refused = self.going_away and not self._drain_ping
        if refused or len(self.streams) >= self.limits.max_concurrent_streams:
            self._stream_error(stream_id, ErrorCode.REFUSED_STREAM)
            return
        end = bool(flags & 1)
        stream = self.owner.new_stream(self, stream_id, head, end)
        if stream is None and stream_id not in self.streams:
            self._stream_error(stream_id, ErrorCode.REFUSED_STREAM)

    def add(self, stream: Stream, *, remote_closed: bool) -> None:
        """Server side, from ``Owner.new_stream``: the stream exists from now on."""
        stream.remote_closed = remote_closed
        self.streams[stream.id] = stream

    def _request_trailers(self, stream: Stream, block: bytes, flags: int) -> None:
        if stream.remote_closed:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, f"HEADERS on closed stream {stream.id}")
        if not flags & 1:
            self._stream_error(stream.id, ErrorCode.PROTOCOL_ERROR)
            return
        self._close_remote(stream)
        stream.on_trailers(ReplyHead(()))

    def _headers_on_closed(self, stream_id: int) -> None:
        if stream_id == 0 or self._is_idle(stream_id) or not stream_id & 1:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"HEADERS on idle stream {stream_id}")
        if stream_id not in self._forgotten:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, f"HEADERS on closed stream {stream_id}")

    def _decode(
        self, stream_id: int, block: bytes, *, as_reply: bool
    ) -> RequestHead | ReplyHead | None:
        """Decode a block that is not cached; None when the stream was ended for it."""
        if stream_id == 0:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "HEADERS on stream 0")
        try:
            fields, unchanged = self._decoder.decode(block)
        except HpackError as error:
            raise ProtocolError(ErrorCode.COMPRESSION_ERROR, str(error)) from None
        except HeaderListTooLarge:
            self._drop_heads()
            self._malformed(stream_id, ErrorCode.ENHANCE_YOUR_CALM)
            return None
        if not unchanged:
            self._drop_heads()
        head: RequestHead | ReplyHead
        try:
            head = ReplyHead(fields) if as_reply else RequestHead(fields)
        except MalformedHead:
            self._malformed(stream_id, ErrorCode.PROTOCOL_ERROR)
            return None
        if unchanged and (self.client or not as_reply):
            self._heads_bytes += len(block)
            if len(self._heads) >= _CACHE_ENTRIES or self._heads_bytes > _CACHE_BYTES:
                self._drop_heads()
                self._heads_bytes = len(block)
            self._heads[block] = head
        return head

    def _malformed(self, stream_id: int, code: ErrorCode) -> None:
        """A stream error for a block whose stream may not even exist yet."""
        if not self.client and stream_id & 1 and stream_id > self.last_peer_stream:
            self.last_peer_stream = stream_id
        elif stream_id not in self.streams and stream_id not in self._forgotten:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        self._stream_error(stream_id, code)

    def _drop_heads(self) -> None:
        self._heads.clear()
        self._heads_bytes = 0

    # ------------------------------------------------------------------ control frames

    def _control_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if not self.settings_seen and kind != frames.SETTINGS:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "the first frame must be SETTINGS")
        if kind == frames.WINDOW_UPDATE:
            self._count("control frames", self.limits.control_frames_per_10s)
            self._window_update(stream_id, payload)
        elif kind == frames.RST_STREAM:
            self._rst_stream(stream_id, payload)
        elif kind == frames.SETTINGS:
            self._settings(flags, stream_id, payload)
        elif kind == frames.PING:
            self._ping(flags, stream_id, payload)
        elif kind == frames.GOAWAY:
            self._goaway(stream_id, payload)
        elif kind == frames.CONTINUATION:
            self._continuation(stream_id, flags, payload)
        elif kind == frames.PUSH_PROMISE:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE is not enabled")
        else:
            self._count("control frames", self.limits.control_frames_per_10s)
            if kind == frames.PRIORITY:
                self._priority(stream_id, payload)

    def _priority(self, stream_id: int, payload: bytes) -> None:
        if stream_id == 0:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            if self._is_idle(stream_id):
                raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "PRIORITY is not 5 bytes")
            self._stream_error(stream_id, ErrorCode.FRAME_SIZE_ERROR)
        elif frames.parse_u32(payload) & frames.MAX_STREAM_ID == stream_id:
            self._priority_on_itself(stream_id)

    def _window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE is not 4 bytes")
        increment = frames.parse_u32(payload) & frames.MAX_WINDOW
        if stream_id == 0:
            if increment == 0:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "window increment of 0")
            self.send_window += increment
            if self.send_window > frames.MAX_WINDOW:
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "connection window too large")
            if self._blocked:
                self.resume()
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE on an idle stream")
            return
        if increment == 0:
            self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        stream.send_window += increment
        if stream.send_window > frames.MAX_WINDOW:
            self._stream_error(stream_id, ErrorCode.FLOW_CONTROL_ERROR)
        elif stream.queue is not None:
            self._send_queued(stream)

    def _rst_stream(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM is not 4 bytes")
        if stream_id == 0 or self._is_idle(stream_id):
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM on stream {stream_id}")
        self._count("resets", self.limits.resets_per_10s)
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            self._blocked.pop(stream, None)
            stream.queue = None
            stream.local_closed = stream.remote_closed = True
            stream.on_reset(frames.parse_u32(payload))

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & frames.ACK:
            if payload:
                raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS ACK with a payload")
            if not self.settings_seen:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "the first frame must be SETTINGS")
            return
        if len(payload) % 6:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of a broken length")
        self._count("SETTINGS frames", self.limits.settings_per_10s)
        first = not self.settings_seen
        self.settings_seen = True
        if first and self.client:
            self.peer_max_streams = frames.MAX_STREAM_ID  # no limit unless the peer names one
        for key, value in frames.parse_settings(payload):
            self._setting(key, value)
        self.control(frames.SETTINGS_ACK)
        self.owner.on_settings(self)

    def _setting(self, key: int, value: int) -> None:
        if key == frames.SETTINGS_INITIAL_WINDOW_SIZE:
            if value > frames.MAX_WINDOW:
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "initial window too large")
            delta = value - self.peer_initial_window
            self.peer_initial_window = value
            for stream in list(self.streams.values()):
                stream.send_window += delta
                if stream.send_window > frames.MAX_WINDOW:
                    raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "stream window too large")
            if delta > 0:
                self.resume()
        elif key == frames.SETTINGS_MAX_FRAME_SIZE:
            if not frames.DEFAULT_FRAME_BYTES <= value <= frames.MAX_FRAME_BYTES:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "max frame size out of range")
            self.peer_max_frame = value
        elif key == frames.SETTINGS_ENABLE_PUSH:
            if value > 1 or (self.client and value):
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH out of range")
        elif key == frames.SETTINGS_MAX_CONCURRENT_STREAMS:
            if self.client:
                self.peer_max_streams = value
        elif key == frames.SETTINGS_HEADER_TABLE_SIZE and value < frames.DEFAULT_TABLE_BYTES:
            # The peer's decoder wants to see the smaller size acknowledged; we use no table.
            self._block_prefix = b"\x20"

    def _ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "PING is not 8 bytes")
        if not flags & frames.ACK:
            self._count("PING frames", self.limits.pings_per_10s)
            self.control(frames.ping(payload, ack=True))
        elif payload == self._drain_ping:
            # The peer has seen the first GOAWAY: what it has opened by now is all there will be.
            self._drain_ping = b""
            self.control(frames.goaway(self.last_peer_stream, ErrorCode.NO_ERROR))

    def _goaway(self, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY is too short")
        last = frames.parse_u32(payload) & frames.MAX_STREAM_ID
        self.going_away = True
        if self.client:
            for stream in [s for s in self.streams.values() if s.id > last]:
                self.streams.pop(stream.id, None)
                self._blocked.pop(stream, None)
                stream.queue = None
                stream.local_closed = stream.remote_closed = True
                stream.on_reset(ErrorCode.REFUSED_STREAM)
        self.owner.on_goaway(self)
