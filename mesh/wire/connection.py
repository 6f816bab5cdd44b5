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

from typing import Final

from mesh.wire import frames
from mesh.wire.control import Control
from mesh.wire.frames import ErrorCode, ProtocolError, unpack_header
from mesh.wire.head import MalformedHead, ReplyHead, RequestHead
from mesh.wire.hpack import HeaderListTooLarge, HpackError
from mesh.wire.stream import Buffer, Stream

_CACHE_ENTRIES: Final = 1_024
_CACHE_BYTES: Final = 256 * 1024
# DATA frames of at least this size are looked at as runs, up to this much at once.
_RUN_BYTES: Final = 4 * 1024
_RUN_BYTES_MAX: Final = 256 * 1024


class Connection(Control):
    """See the module's docstring."""

    def receive(self, data: Buffer, now_s: float) -> None:
        """Everything that one read brought."""
        if self.closed:
            return
        self.now_s = self.last_read_s = now_s
        try:
            self._receive(data)
            credit = self._recv_credit
            if credit >= self._conn_credit_step and not self.closed:
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
        streams, heads, client = self.streams, self._heads, self.client
        max_frame = self.limits.max_frame_bytes
        while end - position >= 9:
            high, low, kind, flags, stream_id = unpack_header(data, position)
            length = high << 8 | low
            if length > max_frame:
                raise ProtocolError(
                    ErrorCode.FRAME_SIZE_ERROR, f"frame of {length} bytes is over the limit"
                )
            start = position + 9
            following = start + length
            # The hit path: a whole DATA frame without padding on an open stream, and a reply's
            # header block that is cached. Everything else takes the long way.
            if kind == 0 and following <= end and not flags & 8:
                stream = streams.get(stream_id)
                if (
                    stream is not None
                    and 0 < length <= stream.recv_window
                    and length <= self.recv_window
                    and not stream.remote_closed
                    and stream.headers_seen
                    and self._continued is None
                ):
                    if length >= _RUN_BYTES and not flags & 1 and type(data) is not bytes:
                        position = self._data_run(data, start, following, end, stream)
                        if self.closed:
                            return
                        continue
                    self.recv_window -= length
                    self._recv_credit += length
                    stream.recv_window -= length
                    position = following
                    if flags & 1:
                        stream.remote_closed = True
                        if stream.local_closed:
                            del streams[stream_id]
                        stream.on_data(data[start:following], True)
                    else:
                        stream.on_data(data[start:following], False)
                    if self.closed:
                        return
                    continue
            elif kind == 1 and following <= end and flags & 0x2C == 4:
                stream = streams.get(stream_id)
                head = heads.get(bytes(data[start:following]))
                if not client:
                    if (
                        type(head) is RequestHead
                        and head.opener is not None
                        and stream_id > self.last_peer_stream
                        and stream_id & 1
                        and stream_id <= frames.MAX_STREAM_ID
                        and len(streams) < self._streams_max
                        and not self.going_away
                        and self._continued is None
                    ):
                        position = following
                        self.last_peer_stream = stream_id
                        stream = head.opener(self, stream_id, head, bool(flags & 1))
                        if stream is None and stream_id not in streams:
                            self._stream_error(stream_id, ErrorCode.REFUSED_STREAM)
                        if self.closed:
                            return
                        continue
                elif (
                    stream is not None
                    and head is not None
                    and not stream.remote_closed
                    and (head.status is None) is stream.headers_seen  # type: ignore[union-attr]
                    and (flags & 1 or not stream.headers_seen)
                    and self._continued is None
                ):
                    position = following
                    if flags & 1:
                        stream.remote_closed = True
                        if stream.local_closed:
                            del streams[stream_id]
                        stream.on_reply(head, True)  # type: ignore[arg-type]
                    else:
                        stream.headers_seen = head.status >= 200  # type: ignore[union-attr,operator]
                        stream.on_reply(head, False)  # type: ignore[arg-type]
                    if self.closed:
                        return
                    continue
            if self._continued is not None and kind != frames.CONTINUATION:
                raise ProtocolError(
                    ErrorCode.PROTOCOL_ERROR,
                    "a header block is not complete: CONTINUATION expected",
                )
            stream_id &= frames.MAX_STREAM_ID  # the reserved bit is to be ignored
            if kind == 0:  # DATA may be cut: its payload is passed on as it comes
                if flags & frames.PADDED and end == start and length:
                    break  # the pad length is not here yet
                position = self._data_frame(data, start, end, length, flags, stream_id)
            else:
                if following > end:
                    break
                payload = bytes(data[start:following])
                position = following
                if kind == 1:
                    if flags & 0x2C == 4:  # END_HEADERS, neither padded nor with priority
                        self._block(stream_id, flags, payload)
                    else:
                        self._headers(stream_id, flags, payload)
                else:
                    self._control_frame(kind, flags, stream_id, payload)
            if self.closed:
                return
        if position < end:
            self._tail = bytes(data[position:])

    def _data_run(self, data: Buffer, start: int, following: int, end: int, stream: Stream) -> int:
        """Whole DATA frames of one stream behind each other in a large read, taken as one.

        The first has been checked. Whatever is special about a frame ends the run before it.
        """
        pieces = [data[start:following]]
        total = following - start
        room = min(stream.recv_window, self.recv_window, _RUN_BYTES_MAX)
        largest = self.limits.max_frame_bytes
        while end - following >= 9:
            high, low, kind, flags, stream_id = unpack_header(data, following)
            length = high << 8 | low
            behind = following + 9 + length
            if (
                kind
                or flags
                or stream_id != stream.id
                or behind > end
                or not 0 < length <= largest
                or total + length > room
            ):
                break
            pieces.append(data[following + 9 : behind])
            total += length
            following = behind
        self.recv_window -= total
        self._recv_credit += total
        stream.recv_window -= total
        if len(pieces) == 1:
            stream.on_data(pieces[0], False)
        else:
            stream.on_data_run(pieces, total)
        return following

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
            elif not stream.headers_seen:
                self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)
                stream = None
            elif length == 0 and not flags & 1:
                self._count_empty(stream)
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
                if padding == length and not flags & 1:
                    self._count_empty(stream)
                stream.consume(padding + 1)  # padding is consumed the moment it comes
        self._data_stream = stream
        self._data_left = length
        self._data_padding = padding
        self._data_flags = flags
        if length == 0:
            self._end_of_data(b"")
            return position
        return self._data_payload(data, position, end) if position < end else position

    def _count_empty(self, stream: Stream) -> None:
        stream.empty_frames += 1
        if stream.empty_frames > self.limits.empty_data_frames_per_stream:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "too many empty DATA frames")

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
        self._count_control()

    def _headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        """HEADERS with padding, priority, or to be continued."""
        if flags & frames.PADDED:
            if not payload:
                raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "padded HEADERS without pad length")
            if payload[0] >= len(payload):
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
                if (head.status is None) is not stream.headers_seen or (
                    stream.headers_seen and not flags & 1
                ):  # no :status in front, one in the trailers, or headers twice
                    self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)
                elif flags & 1:
                    stream.remote_closed = True
                    if stream.local_closed:
                        self.streams.pop(stream_id, None)
                    stream.on_reply(head, True)
                else:
                    stream.headers_seen = head.status is not None and head.status >= 200
                    stream.on_reply(head, False)
        elif stream is not None:
            self._request_trailers(stream, head, flags)
        elif type(head) is RequestHead:
            self._request(stream_id, flags, head)
        elif stream_id in self._forgotten:
            self._count_control()
        else:
            self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)

    def _request(self, stream_id: int, flags: int, head: RequestHead) -> None:
        if stream_id <= self.last_peer_stream or not stream_id & 1:
            if stream_id in self._forgotten:
                self._count_control()
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

    def _request_trailers(self, stream: Stream, head: RequestHead | ReplyHead, flags: int) -> None:
        if stream.remote_closed:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, f"HEADERS on closed stream {stream.id}")
        # A cached request head, or :status: no pseudo-header belongs into trailers.
        if not flags & 1 or not isinstance(head, ReplyHead) or head.status is not None:
            self._stream_error(stream.id, ErrorCode.PROTOCOL_ERROR)
            return
        self._close_remote(stream)
        stream.on_trailers(ReplyHead(()))

    def _headers_on_closed(self, stream_id: int) -> None:
        if stream_id == 0 or self._is_idle(stream_id) or not stream_id & 1:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"HEADERS on idle stream {stream_id}")
        if stream_id not in self._forgotten:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, f"HEADERS on closed stream {stream_id}")
        self._count_control()

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
