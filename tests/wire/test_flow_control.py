"""Flow control against a dumb model of the windows, and a fuzzer that breaks every rule."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.wire import frames
from mesh.wire.connection import Connection
from mesh.wire.frames import DATA, WINDOW_UPDATE
from mesh.wire.limits import PUBLIC
from tests.wire.memory import (
    OK_BLOCK,
    REPLY_BLOCK,
    REQUEST_BLOCK,
    Recorded,
    Recording,
    client,
    data,
    headers,
    output,
    parse,
    server,
)

LIMITS = replace(PUBLIC, settings_per_10s=10**9, resets_per_10s=10**9, pings_per_10s=10**9)


class Windows(RuleBasedStateMachine):
    """We send; the model keeps the peer's books: never beyond a window, nothing lost or doubled.

    The transport fills up and empties, windows grow, shrink below zero, streams are reset.
    """

    @initialize()
    def begin(self) -> None:
        self.link = server(LIMITS)
        self.conn = self.link.conn
        self.connection_window = 65_535
        self.initial = 65_535
        self.max_frame = 16_384
        self.windows: dict[int, int] = {}
        self.owed: dict[int, bytearray] = {}  # given to the connection, not yet seen
        self.ended: dict[int, bool] = {}
        self.next_id = 1
        self.draw = random.Random(7)

    def ids(self) -> list[int]:
        return sorted(self.windows)

    def collect(self) -> None:
        """What leaves, held against the books."""
        for f in parse(output(self.conn)):
            if f.kind == DATA:
                size = len(f.payload)
                assert size <= self.max_frame
                assert f.stream_id in self.windows, "DATA on a stream that is over"
                if size:
                    self.windows[f.stream_id] -= size
                    self.connection_window -= size
                    assert self.windows[f.stream_id] >= 0, "beyond the stream's window"
                    assert self.connection_window >= 0, "beyond the connection's window"
                owed = self.owed[f.stream_id]
                assert owed[:size] == f.payload, "content lost, doubled or out of order"
                del owed[:size]
            if f.flags & frames.END_STREAM and f.kind in (DATA, frames.HEADERS):
                assert self.ended[f.stream_id] and not self.owed[f.stream_id]
                del self.windows[f.stream_id]

    @precondition(lambda self: len(self.windows) < 5)
    @rule()
    def open(self) -> None:
        self.link.receive(headers(self.next_id, end=True))
        stream = self.link.owner.streams[self.next_id]
        stream.send_headers(REPLY_BLOCK, False)
        self.windows[self.next_id] = self.initial
        self.owed[self.next_id] = bytearray()
        self.ended[self.next_id] = False
        self.next_id += 2
        self.collect()

    @precondition(lambda self: self.windows)
    @rule(pick=st.integers(0, 4), size=st.sampled_from([0, 1, 100, 16_384, 50_000, 200_000]))
    def send(self, pick: int, size: int) -> None:
        stream_id = self.ids()[pick % len(self.windows)]
        if self.ended[stream_id]:
            return
        piece = self.draw.randbytes(size)
        self.owed[stream_id] += piece
        self.link.owner.streams[stream_id].send_data(memoryview(piece), False)
        self.collect()

    @precondition(lambda self: self.windows)
    @rule(pick=st.integers(0, 4), trailers=st.booleans())
    def end(self, pick: int, trailers: bool) -> None:
        stream_id = self.ids()[pick % len(self.windows)]
        if self.ended[stream_id]:
            return
        self.ended[stream_id] = True
        stream = self.link.owner.streams[stream_id]
        if trailers:
            stream.send_trailers(OK_BLOCK)
        else:
            stream.send_data(b"", True)
        self.collect()

    @precondition(lambda self: self.windows)
    @rule(pick=st.integers(0, 4), size=st.sampled_from([1, 1_000, 70_000]))
    def grant_stream(self, pick: int, size: int) -> None:
        stream_id = self.ids()[pick % len(self.windows)]
        self.windows[stream_id] += size
        self.link.receive(frames.window_update(stream_id, size))
        self.collect()

    @rule(size=st.sampled_from([1, 1_000, 70_000]))
    def grant_connection(self, size: int) -> None:
        self.connection_window += size
        self.link.receive(frames.window_update(0, size))
        self.collect()

    @rule(size=st.sampled_from([0, 1, 5_000, 65_535, 300_000]))
    def initial_window(self, size: int) -> None:
        for stream_id in self.windows:
            self.windows[stream_id] += size - self.initial
        self.initial = size
        self.link.receive(frames.settings({4: size}))
        self.collect()

    @rule(size=st.sampled_from([16_384, 20_000, 100_000]))
    def max_frame_size(self, size: int) -> None:
        self.max_frame = size
        self.link.receive(frames.settings({5: size}))
        self.collect()

    @rule(writable=st.booleans())
    def transport(self, writable: bool) -> None:
        self.conn.writable = writable
        if writable:
            self.conn.resume()
        self.collect()

    @precondition(lambda self: self.windows)
    @rule(pick=st.integers(0, 4), by_peer=st.booleans())
    def reset(self, pick: int, by_peer: bool) -> None:
        stream_id = self.ids()[pick % len(self.windows)]
        if by_peer:
            self.link.receive(frames.rst_stream(stream_id, 8))
        else:
            self.link.owner.streams[stream_id].reset(8)
        del self.windows[stream_id]
        self.collect()

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "conn"):
            return
        assert not self.conn.closed, self.conn.error
        assert self.conn.send_window == self.connection_window
        assert set(self.conn.streams) == set(self.windows)
        for stream_id, window in self.windows.items():
            stream = self.link.owner.streams[stream_id]
            assert stream.send_window == window
            assert stream.queued_bytes == len(self.owed[stream_id])
            if self.conn.writable and not (self.ended[stream_id] and not stream.queued_bytes):
                stalled = window <= 0 or self.connection_window <= 0
                assert stream.queued_bytes == 0 or stalled, "sendable bytes wait"
        assert set(self.conn._blocked) <= set(self.conn.streams.values())

    def teardown(self) -> None:
        """With all windows open, everything leaves."""
        if not hasattr(self, "conn"):
            return
        self.transport(True)
        self.initial_window(1_000_000)
        for stream_id in self.ids():
            self.windows[stream_id] += 100_000_000
            self.link.receive(frames.window_update(stream_id, 100_000_000))
        self.connection_window += 1_000_000_000
        self.link.receive(frames.window_update(0, 1_000_000_000))
        self.collect()
        assert all(not self.owed[stream_id] for stream_id in self.windows)
        assert all(not self.ended[stream_id] for stream_id in self.windows)


TestWindows = Windows.TestCase
TestWindows.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("window", [1, 100, 5_000, 30_000, 65_536, 1 << 20])
def test_any_window_of_ours_is_given_back_in_time(window: int) -> None:
    """A peer that uses up whatever it was granted is never left waiting."""
    limits = replace(PUBLIC, stream_window_bytes=window)
    link = server(limits, settings={})
    link.receive(headers(1))
    granted, sent = window, 0
    total = min(10 * window, 3_000_000)
    while sent < total:
        assert granted > 0, f"stalled after {sent} bytes"
        step = min(granted, 16_384)
        link.receive(data(1, bytes(step)))
        granted -= step
        sent += step
        for f in parse(output(link.conn)):
            if f.kind == WINDOW_UPDATE and f.stream_id == 1:
                granted += frames.parse_u32(f.payload)
    assert len(link.owner.streams[1].received) == sent and not link.conn.closed


def test_an_unread_stream_is_given_no_credit_and_stalls_nobody() -> None:
    link = server(LIMITS)
    link.owner.taking = False
    link.receive(headers(1))
    link.owner.taking = True
    link.receive(headers(3))
    window = link.conn.stream_window
    for _ in range(window // 16_384):
        link.receive(data(1, bytes(16_384)))
    credited = [f.stream_id for f in parse(output(link.conn)) if f.kind == WINDOW_UPDATE]
    assert set(credited) <= {0}
    for _ in range(1_000):
        link.receive(data(3, bytes(16_384)))
    assert not link.conn.closed and len(link.owner.streams[3].received) == 16_384_000
    link.owner.streams[1].consume(window)
    (update,) = [
        f for f in parse(output(link.conn)) if f.kind == WINDOW_UPDATE and f.stream_id == 1
    ]
    assert frames.parse_u32(update.payload) == window


def test_a_grown_window_is_usable() -> None:
    link = server(LIMITS)
    link.owner.taking = False
    link.receive(headers(1))
    stream = link.owner.streams[1]
    stream.grow_window(1 << 20)
    grown = sum(
        frames.parse_u32(f.payload)
        for f in parse(output(link.conn))
        if f.kind == WINDOW_UPDATE and f.stream_id == 1
    )
    assert link.conn.limits.stream_window_bytes + grown == 1 << 20
    for _ in range((1 << 20) // 16_384):
        link.receive(data(1, bytes(16_384)))
    assert not link.conn.closed and len(stream.received) == 1 << 20


def test_nothing_is_credited_on_a_stream_that_is_over() -> None:
    link = server(LIMITS)
    link.owner.taking = False
    link.receive(headers(1) + data(1, bytes(16_384)) * 15)
    stream = link.owner.streams[1]
    stream.reset(8)
    output(link.conn)
    stream.consume(15 * 16_384)
    assert output(link.conn) == b""


def test_an_end_that_waited_for_the_transport_needs_no_window() -> None:
    """The connection's window is used up by others; a stream's end goes out all the same."""
    link = server(LIMITS)
    for stream_id in (1, 3):
        link.receive(headers(stream_id, end=True))
        link.owner.streams[stream_id].send_headers(REPLY_BLOCK, False)
    link.owner.streams[1].send_data(bytes(200_000), False)
    assert link.conn.send_window == 0
    link.conn.writable = False
    link.owner.streams[3].send_data(b"", True)
    assert 3 in link.conn.streams
    link.conn.writable = True
    link.conn.resume()
    assert 3 not in link.conn.streams and 1 in link.conn.streams


def test_a_stalled_queue_of_tiny_pieces_is_joined() -> None:
    link = server(LIMITS, settings={4: 0})
    link.receive(headers(1, end=True))
    stream = link.owner.streams[1]
    stream.send_headers(REPLY_BLOCK, False)
    raw = bytes(range(256)) * 100
    for position in range(len(raw)):
        stream.send_data(memoryview(raw)[position : position + 1], False)
    assert stream.queue is not None and len(stream.queue) < 30
    output(link.conn)
    link.receive(frames.window_update(1, 1 << 20))
    assert b"".join(f.payload for f in parse(output(link.conn)) if f.kind == DATA) == raw


# --- fuzz -------------------------------------------------------------------------------------


def _valid(draw: random.Random, *, client_side: bool) -> bytes:
    out = frames.settings({})
    for _ in range(draw.randint(1, 15)):
        stream_id = draw.choice([1, 3, 5, 7])
        block = draw.choice([REQUEST_BLOCK, OK_BLOCK, REPLY_BLOCK])
        out += draw.choice(
            [
                headers(stream_id, block, end=draw.random() < 0.3),
                data(stream_id, draw.randbytes(draw.randint(0, 300)), end=draw.random() < 0.3),
                frames.window_update(draw.choice([0, stream_id]), draw.randint(0, 1 << 31)),
                frames.rst_stream(stream_id, draw.randint(0, 20)),
                frames.settings({draw.randint(0, 8): draw.randint(0, 1 << 32 - 1)}),
                frames.ping(draw.randbytes(8), ack=draw.random() < 0.5),
                frames.goaway(draw.randint(0, 9), draw.randint(0, 20), draw.randbytes(3)),
                frames.frame_header(4, draw.randint(0, 255), draw.randint(0, 255), stream_id)
                + draw.randbytes(4),
            ]
        )
    return out if client_side else frames.PREFACE + out


def _mutated(draw: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw.choice([0, 1, 1, 2, 5, 20])):
        position = draw.randrange(len(changed))
        action = draw.randrange(4)
        if action == 0:
            changed[position] ^= 1 << draw.randrange(8)
        elif action == 1:
            changed[position] = draw.randrange(256)
        elif action == 2:
            del changed[position : position + draw.randint(1, 20)]
        else:
            changed[position:position] = draw.randbytes(draw.randint(1, 20))
        if not changed:
            changed = bytearray(b"\0")
    return bytes(changed)


@given(st.integers(0, 2**64), st.booleans())
@settings(max_examples=1_000, deadline=None)
def test_mutated_frames(seed: int, client_side: bool) -> None:
    draw = random.Random(seed)
    owner = Recording()
    conn = Connection(owner, PUBLIC, client=client_side)
    raw = _mutated(draw, _valid(draw, client_side=client_side))
    if client_side:
        conn.receive(frames.settings({}), 0.0)
        for _ in range(3):
            owner.open(conn).send_headers(REQUEST_BLOCK, draw.random() < 0.5)
    for start in range(0, len(raw), 97):
        conn.receive(raw[start : start + 97], 0.0)
        for stream in list(owner.streams.values()):
            if not stream.local_closed and draw.random() < 0.3:
                stream.send_data(bytes(draw.randint(0, 70_000)), draw.random() < 0.2)
    assert len(conn._tail) <= 9 + PUBLIC.max_frame_bytes
    assert conn._heads_bytes <= 256 * 1024 and len(conn._heads) <= 1_024
    assert len(conn.streams) <= PUBLIC.max_concurrent_streams
    if conn.closed:
        assert not conn.streams and conn.error is not None
        assert parse(output(conn))[-1].kind == frames.GOAWAY
        conn.receive(raw, 0.0)
        assert output(conn) == b""  # what is over stays over
    ends = [[e for e in s.events if e[0] in ("reset", "lost")] for s in owner.streams.values()]
    assert all(len(end) <= 1 for end in ends), "a stream ended twice"
    conn.connection_lost("over")
    assert not conn.streams and not conn._blocked


@given(st.binary(max_size=400), st.booleans())
@settings(max_examples=300, deadline=None)
def test_garbage(raw: bytes, hello: bool) -> None:
    link = server()
    conn = link.conn if hello else Connection(Recording(), PUBLIC, client=False)
    conn.receive(raw, 0.0)
    assert len(conn._tail) <= 400
    ours = client()
    stream: Recorded = ours.owner.open(ours.conn)
    stream.send_headers(REQUEST_BLOCK, True)
    ours.receive(raw)
    ours.conn.connection_lost("over")
    assert [e[0] for e in stream.events].count("lost") + stream.names.count("reset") <= 1
