"""Control frames: SETTINGS, PING, GOAWAY, WINDOW_UPDATE, RST_STREAM, PRIORITY (RFC 9113, 6)."""

from __future__ import annotations

from mesh.wire import frames
from mesh.wire.frames import ErrorCode, ProtocolError
from mesh.wire.outbound import Outbound


class Control(Outbound):
    """What the peer says about the connection and its streams, but for their content."""

    def _continuation(self, stream_id: int, flags: int, payload: bytes) -> None:
        """CONTINUATION belongs to the parser of header blocks."""
        raise NotImplementedError

    def _is_idle(self, stream_id: int) -> bool:
        ours = (stream_id & 1 == 1) == self.client
        return stream_id >= self._next_stream if ours else stream_id > self.last_peer_stream

    def _priority_on_itself(self, stream_id: int) -> None:
        raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} depends on itself")

    def _control_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if not self.settings_seen and kind != frames.SETTINGS:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "the first frame must be SETTINGS")
        if kind == frames.WINDOW_UPDATE:
            self._count_control()
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
            self._count_control()
            if kind == frames.PRIORITY:
                self._priority(stream_id, payload)

    def _count_control(self) -> None:
        self._count("control frames", self.limits.control_frames_per_10s, earning=True)

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
            self.granted += increment
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
        else:
            if stream.queue is not None:
                self._send_queued(stream)
            stream.on_granted()

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
            self._count_control()
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
        # The acknowledgement first: only behind it may data make use of a larger window.
        self.control(frames.SETTINGS_ACK)
        if self._blocked:
            self.resume()
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
            self._count("PING frames", self.limits.pings_per_10s, earning=True)
            self.control(frames.ping(payload, ack=True))
            return
        self._count_control()
        if payload == self._drain_ping:
            # The peer has seen the first GOAWAY: what it has opened by now is all there will be.
            self._drain_ping = b""
            self.control(frames.goaway(self.last_peer_stream, ErrorCode.NO_ERROR))

    def _goaway(self, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY is too short")
        self._count_control()
        last = frames.parse_u32(payload) & frames.MAX_STREAM_ID
        if self.client:  # a client's GOAWAY is about our pushes: it may still send requests
            self.going_away = True
            for stream in [s for s in self.streams.values() if s.id > last]:
                self.streams.pop(stream.id, None)
                self._blocked.pop(stream, None)
                stream.queue = None
                stream.local_closed = stream.remote_closed = True
                stream.on_reset(ErrorCode.REFUSED_STREAM)
        self.owner.on_goaway(self)
