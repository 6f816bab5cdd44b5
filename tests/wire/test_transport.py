"""The shell of a connection on a scripted transport: time-outs, faults of others, last words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mesh.wire import frames
from mesh.wire.connection import Connection
from mesh.wire.frames import ErrorCode
from mesh.wire.limits import PUBLIC, Limits
from mesh.wire.transport import Link, Pump
from tests.wire.memory import (
    REPLY_BLOCK,
    Frame,
    Recorded,
    Recording,
    data,
    headers,
    parse,
)

HELLO = frames.PREFACE + frames.settings({})


class ScriptedTransport(asyncio.Transport):
    """Keeps what is written; ``broken`` raises at the next write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = self.aborted = self.broken = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        if self.broken:
            raise RuntimeError("scripted")
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = self.closing = True

    @property
    def frames(self) -> list[Frame]:
        return parse(bytes(self.written))


class Silent(Recorded):
    """Waits for the first bytes of a request."""

    __slots__ = ()

    def waits_for_prefix(self) -> bool:
        return not self.received


class Faulty(Recording):
    """An owner whose code has faults."""

    def new_stream(self, conn: Any, stream_id: int, head: Any, end: bool) -> Any:
        if stream_id == 13:
            raise KeyError("scripted")
        if stream_id == 15:
            stream = Silent(conn, stream_id, self)
            self.streams[stream_id] = stream
            conn.add(stream, remote_closed=end)
            return stream
        return super().new_stream(conn, stream_id, head, end)


class Bench:
    """One pump, links on scripted transports, and a clock of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pump = Pump(self.loop)
        self.down: list[str] = []

    def link(self, limits: Limits = PUBLIC) -> tuple[Link, ScriptedTransport, Faulty]:
        owner = Faulty()
        link = Link(
            self.pump,
            lambda _now_s: Connection(owner, limits, client=False, now_s=0.0),
            on_down=lambda _link, reason: self.down.append(reason),
        )
        transport = ScriptedTransport()
        link.connection_made(transport)
        return link, transport, owner

    def read(self, link: Link, raw: bytes) -> None:
        buffer = link.get_buffer(-1)
        buffer[: len(raw)] = raw
        link.buffer_updated(len(raw))
        link.conn.now_s = link.conn.last_read_s = 0.0  # the bench's clock
        for stream in link.conn.streams.values():
            stream.started_s = stream.progress_s = 0.0


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.loop.close()


def last_code(transport: ScriptedTransport) -> ErrorCode:
    last = transport.frames[-1]
    assert last.kind == frames.GOAWAY
    return ErrorCode(last.code)


def test_no_preface_in_time(bench: Bench) -> None:
    link, transport, _ = bench.link()
    link.check(5.0, slow=True)
    assert not transport.closing
    link.check(5.1, slow=True)
    assert transport.closing and last_code(transport) is ErrorCode.SETTINGS_TIMEOUT


def test_no_settings_in_time(bench: Bench) -> None:
    link, transport, _ = bench.link()
    bench.read(link, frames.PREFACE)
    link.check(5.1, slow=True)
    assert transport.closing


def test_idle(bench: Bench) -> None:
    link, transport, _ = bench.link()
    bench.read(link, HELLO)
    link.check(3_600.0, slow=True)
    assert not transport.closing
    link.check(3_601.0, slow=True)
    assert transport.closing and last_code(transport) is ErrorCode.NO_ERROR


def test_a_call_in_flight_is_not_idle(bench: Bench) -> None:
    link, transport, _ = bench.link()
    bench.read(link, HELLO + headers(1, end=True))
    link.check(10_000.0, slow=True)
    assert not transport.closing


def test_a_header_block_that_is_not_completed(bench: Bench) -> None:
    link, transport, _ = bench.link()
    bench.read(link, HELLO + headers(1, b"", more=True))
    link.conn.header_block_since_s = 1.0
    link.conn.streams[99] = Recorded(link.conn, 99, Recording())  # others are busy
    link.check(11.0, slow=True)
    assert not transport.closing
    link.check(11.1, slow=True)
    assert transport.closing


def test_a_request_without_its_first_bytes(bench: Bench) -> None:
    link, transport, owner = bench.link()
    bench.read(link, HELLO + headers(13 + 2))
    bench.read(link, headers(17))  # this one may be silent
    link.check(10.0, slow=True)
    assert owner.streams[15].names == []
    link.check(10.1, slow=True)
    assert owner.streams[15].events == [("reset", ErrorCode.CANCEL)]
    assert owner.streams[17].names == [] and not transport.closing


def test_a_reader_that_makes_no_progress_costs_its_stream(bench: Bench) -> None:
    link, transport, owner = bench.link()
    bench.read(link, HELLO + headers(1, end=True) + headers(3, end=True))
    stuck, other = owner.streams[1], owner.streams[3]
    for stream in (stuck, other):
        stream.send_headers(REPLY_BLOCK, False)
    stuck.send_data(bytes(100_000), False)
    link.check(60.0, slow=True)
    assert "reset" not in stuck.names
    link.check(60.1, slow=True)
    assert "reset" in stuck.names and other.names == [] and not transport.closing


def test_a_peer_that_does_not_read_our_last_words_is_cut_off(bench: Bench) -> None:
    link, transport, _ = bench.link()
    bench.read(link, b"GET / HTTP/1.1\r\n\r\n")
    assert transport.closing and not transport.aborted  # the GOAWAY may still be under way
    for second in range(100, 105):
        link.check(float(second), slow=True)
    assert not transport.aborted
    link.check(105.1, slow=True)
    assert transport.aborted


def test_a_fault_in_a_handler_costs_that_connection(bench: Bench) -> None:
    link, transport, owner = bench.link()
    other, other_transport, _ = bench.link()
    bench.read(other, HELLO)
    bench.read(link, HELLO + headers(11))
    bench.read(link, headers(13))
    assert last_code(transport) is ErrorCode.INTERNAL_ERROR and transport.closing
    assert owner.streams[11].names == ["lost"]
    assert not bench.pump.reading
    bench.read(other, headers(1) + frames.ping(bytes(8)))
    assert other_transport.frames[-1].kind == frames.PING


def test_a_broken_write_does_not_keep_the_others_output(bench: Bench) -> None:
    first, first_transport, _ = bench.link()
    second, second_transport, _ = bench.link()
    bench.pump.flush()
    first_transport.broken = True
    before = len(second_transport.written)
    first.conn.control(frames.ping(bytes(8)))
    second.conn.control(frames.ping(bytes(8)))
    bench.pump.flush()
    assert first_transport.aborted
    assert len(second_transport.written) == before + 17


def test_a_fault_on_a_deadline_does_not_stop_the_clock(bench: Bench) -> None:
    class Wrong(Recorded):
        __slots__ = ()

        def on_deadline(self) -> None:
            raise KeyError("scripted")

    link, transport, owner = bench.link()
    bench.read(link, HELLO)
    wrong = Wrong(link.conn, 1, owner)
    wrong.deadline_s = 0.0
    link.conn.streams[1] = wrong
    bench.pump._tick()
    assert transport.aborted and bench.pump._timer is not None


def test_every_stream_hears_of_the_loss(bench: Bench) -> None:
    class Wrong(Recorded):
        __slots__ = ()

        def on_lost(self, reason: str) -> None:
            raise KeyError("scripted")

    link, _, owner = bench.link()
    bench.read(link, HELLO)
    link.conn.streams[1] = Wrong(link.conn, 1, owner)
    bench.read(link, headers(3))
    link.connection_lost(None)
    assert owner.streams[3].names == ["lost"] and bench.down == ["connection closed by peer"]


def test_a_read_buffer_is_used_again_only_when_nobody_looks_at_it(bench: Bench) -> None:
    link, _, owner = bench.link(replace(PUBLIC, stream_window_bytes=1 << 20))
    owner.taking = False
    kept: list[memoryview] = []

    class Keeping(Recorded):
        __slots__ = ()

        def on_data(self, data: Any, end: bool) -> None:
            kept.append(data)

    bench.read(link, HELLO)
    link.conn.streams[1] = Keeping(link.conn, 1, owner)
    link.conn.last_peer_stream = 1
    for turn in range(40):
        body = bytes([turn]) * 16_384
        bench.read(link, data(1, body) + data(1, body[:100]))
    assert [bytes(piece[:3]) for piece in kept[::2]] == [bytes([t]) * 3 for t in range(40)]
    assert len(bench.pump._buffers) <= 16
    kept.clear()
    assert bench.pump.buffer() is bench.pump._buffers[-1]
