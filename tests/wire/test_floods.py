"""Floods of what is allowed once cost the flooder's own connection, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mesh.wire import frames, hpack
from mesh.wire.frames import (
    ACK,
    CONTINUATION,
    DATA,
    GOAWAY,
    PADDED,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    ErrorCode,
)
from mesh.wire.limits import PUBLIC
from tests.wire.memory import (
    OK,
    OK_BLOCK,
    REPLY_BLOCK,
    REQUEST,
    REQUEST_BLOCK,
    Connected,
    data,
    frame,
    headers,
    output,
    sent,
    server,
)

CALM = ErrorCode.ENHANCE_YOUR_CALM
LIMITS = replace(
    PUBLIC,
    resets_per_10s=20,
    settings_per_10s=5,
    pings_per_10s=10,
    control_frames_per_10s=50,
    empty_data_frames_per_stream=10,
)


def rapid_reset(turn: int) -> bytes:
    return headers(1 + 2 * turn) + frames.rst_stream(1 + 2 * turn, 8)


def made_to_reset(turn: int) -> bytes:
    """We reset each stream, for the client broke a rule on it."""
    return headers(1 + 2 * turn) + frames.window_update(1 + 2 * turn, 0)


def malformed(turn: int) -> bytes:
    return headers(1 + 2 * turn, hpack.encode(((b":path", b"/"),)), end=True)


def too_large(turn: int) -> bytes:
    return headers(1 + 2 * turn, hpack.encode((*REQUEST, *[(b"a", b"b")] * 101)), end=True)


def empty_data(turn: int) -> bytes:
    return (b"" if turn else headers(1)) + data(1, b"")


def empty_padded_data(turn: int) -> bytes:
    return (b"" if turn else headers(1)) + frame(DATA, PADDED, 1, b"\x03" + bytes(3))


def data_on_reset(turn: int) -> bytes:
    begin = b"" if turn else headers(1) + frames.window_update(1, 0)
    return begin + data(1, b"")


def trailers_on_reset(turn: int) -> bytes:
    begin = b"" if turn else headers(1) + frames.window_update(1, 0)
    return begin + headers(1, OK_BLOCK, end=True)


FLOODS: dict[str, Callable[[int], bytes]] = {
    "rapid-reset": rapid_reset,
    "made-to-reset": made_to_reset,
    "malformed-requests": malformed,
    "requests-over-a-bound": too_large,
    "settings": lambda _: frames.settings({}),
    "settings-acks": lambda _: frame(SETTINGS, ACK),
    "pings": lambda _: frames.ping(bytes(8)),
    "ping-acks": lambda _: frames.ping(bytes(8), ack=True),
    "priority": lambda turn: frame(PRIORITY, 0, 1 + 2 * turn, bytes(5)),
    "unknown-frames": lambda _: frame(0x42, 0, 0, b"?"),
    "window-updates": lambda _: frames.window_update(0, 1),
    "goaways": lambda _: frames.goaway(0, 0),
    "empty-data": empty_data,
    "empty-padded-data": empty_padded_data,
    "data-on-a-reset-stream": data_on_reset,
    "trailers-on-a-reset-stream": trailers_on_reset,
}


def flood(link: Connected, turn_of: Callable[[int], bytes], turns: int, *, now_s: float) -> None:
    for turn in range(turns):
        link.receive(turn_of(turn), now_s)


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_the_connection(name: str) -> None:
    link = server(LIMITS)
    flood(link, FLOODS[name], 4, now_s=0.0)
    assert not link.conn.closed, "the first few are nothing to worry about"
    output(link.conn)
    link = server(LIMITS)
    bystander = server(LIMITS)
    flood(link, FLOODS[name], 200, now_s=0.0)
    last = sent(link.conn)[-1]
    assert (last.kind, ErrorCode(last.code)) == (GOAWAY, CALM)
    assert link.conn.closed and not link.conn.streams
    bystander.receive(headers(1, end=True))
    assert not bystander.conn.closed and 1 in bystander.conn.streams


@pytest.mark.parametrize("name", [n for n in FLOODS if not n.startswith("empty")])
def test_the_same_spread_over_time_is_fine(name: str) -> None:
    link = server(LIMITS)
    for turn in range(100):
        link.receive(FLOODS[name](turn), turn * 10.0)
        assert not link.conn.closed
        output(link.conn)


def test_refused_streams_count_as_resets() -> None:
    link = server(replace(LIMITS, max_concurrent_streams=1))
    for turn in range(100):
        link.receive(headers(1 + 2 * turn))
    assert link.conn.closed and link.conn.error is not None
    assert link.conn.error.code == CALM


def test_what_is_remembered_of_reset_streams_is_bounded() -> None:
    """Slowly, so that no rate is exceeded."""
    link = server(replace(PUBLIC, resets_per_10s=10**9))
    for turn in range(6_000):
        link.receive(malformed(turn))
        output(link.conn)
    assert not link.conn.closed and len(link.conn._forgotten) <= 4_096


@pytest.mark.parametrize("with_end", [False, True], ids=["without-end", "with-end-later"])
def test_continuations_are_bounded(with_end: bool) -> None:
    link = server()
    link.receive(headers(1, b"", more=True))
    for _ in range(9):
        link.receive(frame(CONTINUATION, 0, 1, b""))
    if with_end:
        link.receive(frame(CONTINUATION, 4, 1, REQUEST_BLOCK))
    assert link.conn.error is not None and link.conn.error.code == CALM


def test_eight_continuations_are_fine() -> None:
    link = server()
    pieces = [REQUEST_BLOCK[i : i + 12] for i in range(0, len(REQUEST_BLOCK), 12)]
    assert len(pieces) <= 9
    link.receive(headers(1, b"", more=True))
    for piece in pieces[:-1]:
        link.receive(frame(CONTINUATION, 0, 1, piece))
    link.receive(frame(CONTINUATION, 4, 1, pieces[-1]))
    assert link.owner.log == [(1, "request", REQUEST, False)]


def test_a_client_that_reads_no_control_frames() -> None:
    link = server(replace(PUBLIC, pings_per_10s=10**9, settings_per_10s=10**9))
    link.conn.writable = False  # the transport's buffer is full
    for _ in range(10_000):
        link.receive(frames.ping(bytes(8)))
    assert link.conn.error is not None and link.conn.error.code == CALM
    assert len(output(link.conn)) < 2 * PUBLIC.max_control_output_bytes


def test_window_updates_do_not_reset_what_is_unread() -> None:
    """A blocked stream and the connection's window growing: still nothing of ours is read."""
    link = server(replace(PUBLIC, pings_per_10s=10**9))
    link.receive(headers(1, end=True))
    stream = link.owner.streams[1]
    stream.send_headers(REPLY_BLOCK, False)
    stream.send_data(bytes(200_000), False)
    link.conn.writable = False
    for _ in range(10_000):
        link.receive(frames.ping(bytes(8)) + frames.window_update(0, 1))
    assert link.conn.error is not None and link.conn.error.code == CALM


def test_replies_that_are_not_read_are_bounded() -> None:
    """Each call is answered and over: no limit on streams stops a client that never reads."""
    limits = replace(PUBLIC, max_buffered_bytes_per_connection=100_000)
    link = server(limits)
    link.conn.writable = False
    block = hpack.encode((*OK, (b"grpc-message", b"m" * 1_000)))
    for turn in range(1_000):
        stream_id = 1 + 2 * turn
        link.receive(headers(stream_id, end=True))
        if link.conn.closed:
            break
        link.owner.streams[stream_id].send_headers(block, True)
    assert link.conn.error is not None and link.conn.error.code == CALM
    assert len(output(link.conn)) < 2 * limits.max_buffered_bytes_per_connection


def test_a_busy_client_may_credit_every_reply_and_ping() -> None:
    """grpcio: two WINDOW_UPDATEs a call, and pings while data comes. 100,000 calls in 9 s."""
    link = server()
    for call in range(20_000):
        stream_id = 1 + 2 * call
        raw = headers(stream_id, end=True)
        if call % 3 == 0:
            raw += frames.ping(bytes(8))
        link.receive(raw, call / 2_500)
        stream = link.owner.streams.pop(stream_id)
        stream.send_headers(REPLY_BLOCK, False)
        stream.send_data(bytes(400), False)
        stream.send_trailers(OK_BLOCK)
        credit = frames.window_update(0, 400) + frames.window_update(stream_id, 400)
        link.receive(credit + frames.window_update(0, 5), call / 2_500)
        assert not link.conn.closed, link.conn.error
        output(link.conn)
        link.owner.log.clear()
    assert {PING, RST_STREAM}.isdisjoint(f.kind for f in sent(link.conn))


def test_a_stream_of_many_replies_may_be_credited_and_pinged() -> None:
    link = server()
    link.receive(headers(1, end=True))
    stream = link.owner.streams[1]
    stream.send_headers(REPLY_BLOCK, False)
    for turn in range(30_000):
        stream.send_data(bytes(300), False)
        credit = frames.window_update(0, 300) + frames.window_update(1, 300)
        link.receive(credit + (frames.ping(bytes(8)) if turn % 10 == 0 else b""), 1.0)
        assert not link.conn.closed, link.conn.error
        output(link.conn)
        stream.events.clear()
        link.owner.log.clear()
