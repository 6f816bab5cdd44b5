"""Connections without sockets: an owner and streams that write down every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mesh.wire import frames, hpack
from mesh.wire.connection import Connection
from mesh.wire.frames import frame_header
from mesh.wire.head import ReplyHead, RequestHead
from mesh.wire.limits import PUBLIC, Limits
from mesh.wire.outbound import Outbound
from mesh.wire.stream import Buffer, Stream

REQUEST = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/pkg.Service/Method"),
    (b":authority", b"test"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)
REPLY = ((b":status", b"200"), (b"content-type", b"application/grpc"))
OK = ((b"grpc-status", b"0"),)
REQUEST_BLOCK = hpack.encode(REQUEST)
REPLY_BLOCK = hpack.encode(REPLY)
OK_BLOCK = hpack.encode(OK)


class Recorded(Stream):
    """A stream that writes down what it is told. ``taking`` gives every byte back at once."""

    __slots__ = ("events", "owner", "taking")

    def __init__(self, conn: Outbound, stream_id: int, owner: Recording) -> None:
        super().__init__(conn, stream_id)
        self.owner = owner
        self.events: list[tuple[Any, ...]] = []
        self.taking = owner.taking

    def _note(self, *event: Any) -> None:
        self.events.append(event)
        self.owner.log.append((self.id, *event))

    def on_data(self, data: Buffer, end: bool) -> None:
        self._note("data", bytes(data), end)
        if self.taking:
            self.consume(len(data))

    def on_reply(self, head: ReplyHead, end: bool) -> None:
        self._note("reply", head.fields, end)

    def on_trailers(self, head: ReplyHead) -> None:
        self._note("trailers")

    def on_reset(self, code: int) -> None:
        self._note("reset", code)

    def on_lost(self, reason: str) -> None:
        self._note("lost")

    def on_drained(self, sent: int) -> None:
        self._note("drained", sent)

    @property
    def received(self) -> bytes:
        return b"".join(event[1] for event in self.events if event[0] == "data")

    @property
    def names(self) -> list[str]:
        return [event[0] for event in self.events]


class Recording:
    """An owner that accepts every stream, unless told to refuse."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.streams: dict[int, Recorded] = {}
        self.heads: dict[int, RequestHead] = {}
        self.refusing = False
        self.taking = True
        self.goaways = 0
        self.settings = 0

    def new_stream(
        self, conn: Outbound, stream_id: int, head: RequestHead, end: bool
    ) -> Stream | None:
        self.log.append((stream_id, "request", head.fields, end))
        if self.refusing:
            return None
        stream = Recorded(conn, stream_id, self)
        self.streams[stream_id] = stream
        self.heads[stream_id] = head
        conn.add(stream, remote_closed=end)
        return stream

    def on_goaway(self, conn: Outbound) -> None:
        self.goaways += 1

    def on_settings(self, conn: Outbound) -> None:
        self.settings += 1

    def open(self, conn: Outbound) -> Recorded:
        """Client side."""

        def make(outbound: Outbound, stream_id: int) -> Stream:
            return Recorded(outbound, stream_id, self)

        stream = conn.open_stream(make)
        assert isinstance(stream, Recorded)
        self.streams[stream.id] = stream
        return stream


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def code(self) -> int:
        """Of RST_STREAM or GOAWAY."""
        return frames.parse_u32(self.payload, 4 if self.kind == frames.GOAWAY else 0)


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    return frame_header(len(payload), kind, flags, stream_id) + payload


def headers(
    stream_id: int, block: bytes = REQUEST_BLOCK, *, end: bool = False, more: bool = False
) -> bytes:
    flags = (0 if more else frames.END_HEADERS) | (frames.END_STREAM if end else 0)
    return frame(frames.HEADERS, flags, stream_id, block)


def data(stream_id: int, payload: bytes, *, end: bool = False) -> bytes:
    return frame(frames.DATA, frames.END_STREAM if end else 0, stream_id, payload)


def parse(raw: bytes) -> list[Frame]:
    """Frames of an output, the client's preface left out."""
    if raw.startswith(frames.PREFACE):
        raw = raw[len(frames.PREFACE) :]
    found = []
    while raw:
        high, low, kind, flags, stream_id = frames.HEADER.unpack_from(raw)
        end = 9 + (high << 8 | low)
        assert len(raw) >= end, "output ends inside a frame"
        found.append(Frame(kind, flags, stream_id, raw[9:end]))
        raw = raw[end:]
    return found


def output(conn: Connection) -> bytes:
    return b"".join(conn.take_output())


def sent(conn: Connection, kind: int | None = None) -> list[Frame]:
    """What the connection wants to send, taken."""
    return [f for f in parse(output(conn)) if kind is None or f.kind == kind]


def server(limits: Limits = PUBLIC, *, settings: dict[int, int] | None = None) -> Connected:
    """A server connection whose client has said hello."""
    owner = Recording()
    conn = Connection(owner, limits, client=False)
    conn.receive(frames.PREFACE + frames.settings(settings or {}), 0.0)
    output(conn)
    return Connected(conn, owner)


def client(limits: Limits = PUBLIC, *, settings: dict[int, int] | None = None) -> Connected:
    """A client connection whose server has said hello."""
    owner = Recording()
    conn = Connection(owner, limits, client=True)
    conn.receive(frames.settings(settings or {}), 0.0)
    output(conn)
    return Connected(conn, owner)


@dataclass(frozen=True)
class Connected:
    conn: Connection
    owner: Recording

    def receive(self, raw: Buffer, now_s: float = 0.0) -> None:
        self.conn.receive(raw, now_s)
