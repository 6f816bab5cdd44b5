"""What breaks a rule of RFC 9113 costs the stream or the connection, with the code it names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mesh.wire import frames, hpack
from mesh.wire.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
)
from tests.wire.memory import (
    OK,
    OK_BLOCK,
    REPLY,
    REPLY_BLOCK,
    REQUEST,
    REQUEST_BLOCK,
    client,
    data,
    frame,
    headers,
    sent,
    server,
)

PROTOCOL = ErrorCode.PROTOCOL_ERROR
SIZE = ErrorCode.FRAME_SIZE_ERROR
FLOW = ErrorCode.FLOW_CONTROL_ERROR
CLOSED = ErrorCode.STREAM_CLOSED
COMPRESSION = ErrorCode.COMPRESSION_ERROR
CALM = ErrorCode.ENHANCE_YOUR_CALM


@dataclass(frozen=True)
class Case:
    name: str
    raw: bytes
    code: ErrorCode
    stream: int = 0  # 0: the connection dies


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def setting(key: int, value: int) -> bytes:
    return frame(SETTINGS, payload=key.to_bytes(2, "big") + u32(value))


def request(*fields: tuple[bytes, bytes]) -> bytes:
    """A request with these fields behind the usual ones."""
    return headers(1, hpack.encode((*REQUEST, *fields)), end=True)


def without(name: bytes) -> bytes:
    return headers(1, hpack.encode([f for f in REQUEST if f[0] != name]), end=True)


OPEN = headers(1)
HALF = headers(1, end=True)  # half-closed (remote)

CONNECTION_CASES = [
    Case("frame-over-the-limit", frame(DATA, 0, 1, bytes(16_385)), SIZE),
    Case("headers-over-the-limit", frame(HEADERS, 4, 1, bytes(16_385)), SIZE),
    Case("unknown-type-over-the-limit", frame(0x77, 0, 1, bytes(16_385)), SIZE),
    Case("data-on-stream-0", data(0, b"x"), PROTOCOL),
    Case("data-on-idle", data(1, b"x"), PROTOCOL),
    Case("data-on-even-idle", data(2, b"x"), PROTOCOL),
    Case("empty-data-on-idle", data(5, b""), PROTOCOL),
    Case("data-on-half-closed", HALF + data(1, b"x"), CLOSED),
    Case("data-behind-its-end", OPEN + data(1, b"x", end=True) + data(1, b"y"), CLOSED),
    Case("data-padding-of-all", OPEN + frame(DATA, PADDED, 1, b"\x05abcd"), PROTOCOL),
    Case("data-padded-without-length", OPEN + frame(DATA, PADDED, 1), SIZE),
    Case("headers-on-stream-0", headers(0), PROTOCOL),
    Case("headers-to-be-continued-on-stream-0", headers(0, more=True), PROTOCOL),
    Case("headers-on-even-stream", headers(2), PROTOCOL),
    Case("headers-on-half-closed", HALF + headers(1, OK_BLOCK, end=True), CLOSED),
    Case("headers-decreasing-id", headers(5, end=True) + headers(3, end=True), CLOSED),
    Case(
        "headers-on-a-stream-the-client-reset",
        OPEN + frames.rst_stream(1, 8) + headers(1, end=True),
        CLOSED,
    ),
    Case("headers-padding-of-all", frame(HEADERS, PADDED | 4, 1, b"\x03ab"), PROTOCOL),
    Case("headers-padded-without-length", frame(HEADERS, PADDED | 4, 1), SIZE),
    Case("headers-too-short-for-priority", frame(HEADERS, HAS_PRIORITY | 4, 1, b"abcd"), SIZE),
    Case(
        "headers-priority-eaten-by-padding",
        frame(HEADERS, HAS_PRIORITY | PADDED | 4, 1, b"\x05" + bytes(9)),
        SIZE,
    ),
    Case("push-promise", frame(PUSH_PROMISE, 4, 1, u32(2)), PROTOCOL),
    Case("priority-on-stream-0", frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL),
    Case("rst-on-stream-0", frames.rst_stream(0, 8), PROTOCOL),
    Case("rst-on-idle", frames.rst_stream(1, 8), PROTOCOL),
    Case("rst-on-idle-even", frames.rst_stream(2, 8), PROTOCOL),
    Case("rst-too-short", OPEN + frame(RST_STREAM, 0, 1, bytes(3)), SIZE),
    Case("rst-too-long", OPEN + frame(RST_STREAM, 0, 1, bytes(5)), SIZE),
    Case("settings-on-a-stream", frame(SETTINGS, 0, 1), PROTOCOL),
    Case("settings-ack-with-payload", frame(SETTINGS, ACK, 0, bytes(6)), SIZE),
    Case("settings-broken-length", frame(SETTINGS, 0, 0, bytes(7)), SIZE),
    Case("settings-push-2", setting(2, 2), PROTOCOL),
    Case("settings-window-too-large", setting(4, 1 << 31), FLOW),
    Case("settings-frame-too-small", setting(5, 16_383), PROTOCOL),
    Case("settings-frame-too-large", setting(5, 1 << 24), PROTOCOL),
    Case(
        "settings-window-overflows-a-stream",
        OPEN + frames.window_update(1, (1 << 31) - 1 - 65_535) + setting(4, 65_536),
        FLOW,
    ),
    Case("ping-on-a-stream", frame(PING, 0, 1, bytes(8)), PROTOCOL),
    Case("ping-too-short", frame(PING, 0, 0, bytes(7)), SIZE),
    Case("ping-too-long", frame(PING, 0, 0, bytes(9)), SIZE),
    Case("goaway-on-a-stream", frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL),
    Case("goaway-too-short", frame(GOAWAY, 0, 0, bytes(7)), SIZE),
    Case("window-update-too-short", frame(WINDOW_UPDATE, 0, 0, bytes(3)), SIZE),
    Case("window-update-too-long-on-stream", OPEN + frame(WINDOW_UPDATE, 0, 1, bytes(5)), SIZE),
    Case("window-update-of-0", frames.window_update(0, 0), PROTOCOL),
    Case("window-update-on-idle", frames.window_update(1, 5), PROTOCOL),
    Case("connection-window-overflow", frames.window_update(0, (1 << 31) - 1), FLOW),
    Case("continuation-of-nothing", frame(CONTINUATION, 4, 1, OK_BLOCK), PROTOCOL),
    Case("continuation-behind-the-end", OPEN + frame(CONTINUATION, END_HEADERS, 1, b""), PROTOCOL),
    Case(
        "continuation-of-another-stream",
        headers(1, more=True) + frame(CONTINUATION, 4, 3),
        PROTOCOL,
    ),
    Case("data-inside-a-block", OPEN + headers(3, more=True) + data(1, b"x"), PROTOCOL),
    Case("headers-inside-a-block", headers(1, more=True) + headers(3), PROTOCOL),
    Case("ping-inside-a-block", headers(1, more=True) + frames.ping(bytes(8)), PROTOCOL),
    Case("settings-inside-a-block", headers(1, more=True) + frames.settings({}), PROTOCOL),
    Case("rst-inside-a-block", headers(1, more=True) + frames.rst_stream(1, 8), PROTOCOL),
    Case("unknown-inside-a-block", headers(1, more=True) + frame(0x55, 0, 1), PROTOCOL),
    Case("hpack-index-in-no-table", headers(1, b"\xbe"), COMPRESSION),
    Case("hpack-index-0", headers(1, b"\x80"), COMPRESSION),
    Case("hpack-cut-in-a-string", headers(1, b"\x00\x05ab"), COMPRESSION),
    Case("hpack-table-too-large", headers(1, b"\x3f\xe2\x1f" + REQUEST_BLOCK), COMPRESSION),
    Case("hpack-size-update-late", headers(1, REQUEST_BLOCK + b"\x20"), COMPRESSION),
    Case("hpack-broken-in-trailers", OPEN + headers(1, b"\xbe", end=True), COMPRESSION),
]

STREAM_CASES = [
    Case("stream-window-overflow", OPEN + frames.window_update(1, (1 << 31) - 1), FLOW, 1),
    Case("stream-window-update-of-0", OPEN + frames.window_update(1, 0), PROTOCOL, 1),
    Case("priority-broken-on-open-stream", OPEN + frame(PRIORITY, 0, 1, bytes(4)), SIZE, 1),
    Case("trailers-without-end", OPEN + headers(1, OK_BLOCK), PROTOCOL, 1),
    Case("trailers-with-request-pseudo", OPEN + headers(1, REQUEST_BLOCK, end=True), PROTOCOL, 1),
    Case("trailers-with-status", OPEN + headers(1, REPLY_BLOCK, end=True), PROTOCOL, 1),
    Case("empty-block", headers(1, b""), PROTOCOL, 1),
    Case("no-path", without(b":path"), PROTOCOL, 1),
    Case("no-method", without(b":method"), PROTOCOL, 1),
    Case("no-scheme", without(b":scheme"), PROTOCOL, 1),
    Case(
        "empty-path",
        headers(1, hpack.encode([(n, b"" if n == b":path" else v) for n, v in REQUEST])),
        PROTOCOL,
        1,
    ),
    Case("late-pseudo", request((b":authority", b"b")), PROTOCOL, 1),
    Case("unknown-pseudo", headers(1, hpack.encode(((b":x", b"y"), *REQUEST))), PROTOCOL, 1),
    Case("status-in-a-request", headers(1, hpack.encode((REPLY[0], *REQUEST))), PROTOCOL, 1),
    Case("duplicate-path", headers(1, hpack.encode((REQUEST[2], *REQUEST))), PROTOCOL, 1),
    Case("duplicate-method", headers(1, hpack.encode((REQUEST[0], *REQUEST))), PROTOCOL, 1),
    Case("upper-case-name", request((b"X-Thing", b"1")), PROTOCOL, 1),
    Case("empty-name", request((b"", b"1")), PROTOCOL, 1),
    Case("name-with-space", request((b"a b", b"1")), PROTOCOL, 1),
    Case("name-with-colon", request((b"a:b", b"1")), PROTOCOL, 1),
    Case("name-with-nul", request((b"a\0b", b"1")), PROTOCOL, 1),
    Case("name-with-delete", request((b"a\x7f", b"1")), PROTOCOL, 1),
    Case("name-not-ascii", request((b"caf\xc3\xa9", b"1")), PROTOCOL, 1),
    Case("value-with-cr", request((b"a", b"1\r2")), PROTOCOL, 1),
    Case("value-with-lf", request((b"a", b"1\n2")), PROTOCOL, 1),
    Case("value-with-nul", request((b"a", b"1\x002")), PROTOCOL, 1),
    Case("value-with-leading-space", request((b"a", b" 1")), PROTOCOL, 1),
    Case("value-with-trailing-tab", request((b"a", b"1\t")), PROTOCOL, 1),
    Case(
        "path-with-lf",
        headers(1, hpack.encode([*REQUEST[:2], (b":path", b"/a\nb"), *REQUEST[3:]])),
        PROTOCOL,
        1,
    ),
    Case("connection-header", request((b"connection", b"close")), PROTOCOL, 1),
    Case("keep-alive", request((b"keep-alive", b"1")), PROTOCOL, 1),
    Case("proxy-connection", request((b"proxy-connection", b"1")), PROTOCOL, 1),
    Case("transfer-encoding", request((b"transfer-encoding", b"chunked")), PROTOCOL, 1),
    Case("upgrade", request((b"upgrade", b"h2c")), PROTOCOL, 1),
    Case("te-gzip", request((b"te", b"gzip")), PROTOCOL, 1),
    Case("grpc-timeout-9-digits", request((b"grpc-timeout", b"123456789S")), PROTOCOL, 1),
    Case("grpc-timeout-no-unit", request((b"grpc-timeout", b"100")), PROTOCOL, 1),
    Case("too-many-fields", request(*[(b"a", b"b")] * 100), CALM, 1),
    Case("value-too-long", request((b"a", b"v" * 8_193)), CALM, 1),
    Case("list-too-long", request(*[(b"a", b"v" * 235)] * 62), CALM, 1),
]


def cases(table: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table, ids=[case.name for case in table])


@cases(CONNECTION_CASES)
def test_a_connection_error(case: Case) -> None:
    link = server()
    link.receive(case.raw)
    goaway = sent(link.conn)[-1]
    assert (goaway.kind, ErrorCode(goaway.code)) == (GOAWAY, case.code)
    assert link.conn.closed
    for stream in link.owner.streams.values():
        assert stream.names.count("lost") + stream.names.count("reset") == 1 or (
            stream.events[-1][-1] is True  # it had ended already
        )


@cases(STREAM_CASES)
def test_a_stream_error_leaves_the_connection_alone(case: Case) -> None:
    link = server()
    link.receive(case.raw)
    resets = [(f.stream_id, ErrorCode(f.code)) for f in sent(link.conn, RST_STREAM)]
    assert resets == [(case.stream, case.code)]
    assert not link.conn.closed and case.stream not in link.conn.streams
    link.receive(headers(9, end=True))  # others go on
    assert link.owner.log[-1] == (9, "request", REQUEST, True)


@cases(STREAM_CASES)
def test_the_same_with_what_is_under_way_behind_it(case: Case) -> None:
    """Frames that the peer had sent before it saw our RST_STREAM cost nothing."""
    link = server()
    link.receive(case.raw)
    link.receive(data(1, b"late") + frames.window_update(1, 9) + data(1, b"", end=True))
    assert not link.conn.closed


CLIENT_CONNECTION_CASES = [
    Case("headers-on-idle", headers(3, REPLY_BLOCK), PROTOCOL),
    Case("headers-on-even", headers(2, REPLY_BLOCK), PROTOCOL),
    Case("data-on-idle", data(3, b"x"), PROTOCOL),
    Case("push-promise", frame(PUSH_PROMISE, 4, 1, u32(2) + REQUEST_BLOCK), PROTOCOL),
    Case("enable-push", setting(2, 1), PROTOCOL),
    Case(
        "data-behind-the-end",
        headers(1, REPLY_BLOCK) + headers(1, OK_BLOCK, end=True) + data(1, b"x"),
        CLOSED,
    ),
    Case("rst-on-idle", frames.rst_stream(3, 8), PROTOCOL),
    Case("window-update-on-idle", frames.window_update(3, 8), PROTOCOL),
]


@cases(CLIENT_CONNECTION_CASES)
def test_a_server_that_breaks_the_connection(case: Case) -> None:
    link = client()
    stream = link.owner.open(link.conn)
    stream.send_headers(REQUEST_BLOCK, True)
    sent(link.conn)
    link.receive(case.raw)
    goaway = sent(link.conn)[-1]
    assert (goaway.kind, ErrorCode(goaway.code)) == (GOAWAY, case.code)


CLIENT_STREAM_CASES = [
    Case("request-pseudo", headers(1, REQUEST_BLOCK), PROTOCOL, 1),
    Case("status-twice", headers(1, hpack.encode((REPLY[0], *REPLY))), PROTOCOL, 1),
    Case("status-late", headers(1, hpack.encode((*OK, *REPLY))), PROTOCOL, 1),
    Case("status-of-words", headers(1, hpack.encode(((b":status", b"abc"),))), PROTOCOL, 1),
    Case("no-status", headers(1, OK_BLOCK), PROTOCOL, 1),
    Case("no-status-trailers-only", headers(1, OK_BLOCK, end=True), PROTOCOL, 1),
    Case("data-before-headers", data(1, b"x"), PROTOCOL, 1),
    Case(
        "status-in-trailers",
        headers(1, REPLY_BLOCK) + headers(1, REPLY_BLOCK, end=True),
        PROTOCOL,
        1,
    ),
    Case("headers-twice", headers(1, REPLY_BLOCK) + headers(1, REPLY_BLOCK), PROTOCOL, 1),
    Case("connection-header", headers(1, hpack.encode((*REPLY, (b"upgrade", b"x")))), PROTOCOL, 1),
]


@cases(CLIENT_STREAM_CASES)
def test_a_server_that_breaks_a_stream(case: Case) -> None:
    link = client()
    stream = link.owner.open(link.conn)
    stream.send_headers(REQUEST_BLOCK, True)
    sent(link.conn)
    link.receive(case.raw)
    resets = [(f.stream_id, ErrorCode(f.code)) for f in sent(link.conn, RST_STREAM)]
    assert resets == [(1, case.code)] and not link.conn.closed
    assert stream.events[-1] == ("reset", case.code) and not link.conn.streams


FINE = [
    Case("unknown-frame-type", frame(0x99, 0xFF, 7, b"whatever"), ErrorCode.NO_ERROR),
    Case("unknown-setting", setting(0x99, 5), ErrorCode.NO_ERROR),
    Case("unknown-flags", frame(PING, 0xFE, 0, bytes(8)), ErrorCode.NO_ERROR),
    Case("reserved-bit", frame(PING, 0, 1 << 31, bytes(8)), ErrorCode.NO_ERROR),
    Case(
        "reserved-bit-of-increment",
        frame(WINDOW_UPDATE, 0, 0, u32(1 << 31 | 5)),
        ErrorCode.NO_ERROR,
    ),
    Case("priority-on-idle", frame(PRIORITY, 0, 9, bytes(5)), ErrorCode.NO_ERROR),
    Case("rst-twice", OPEN + frames.rst_stream(1, 8) * 2, ErrorCode.NO_ERROR),
    Case(
        "window-update-on-closed",
        OPEN + frames.rst_stream(1, 8) + frames.window_update(1, 9),
        ErrorCode.NO_ERROR,
    ),
    Case("goaway", frames.goaway(0, 0, b"bye") + headers(1, end=True), ErrorCode.NO_ERROR),
    Case("settings-ack", frames.SETTINGS_ACK, ErrorCode.NO_ERROR),
    Case("ping-ack-of-nothing", frames.ping(bytes(8), ack=True), ErrorCode.NO_ERROR),
    Case("te-trailers", request((b"a", b"")), ErrorCode.NO_ERROR),
    Case("all-padding", OPEN + frame(DATA, PADDED, 1, b"\x04" + bytes(4)), ErrorCode.NO_ERROR),
    Case("skipped-ids", headers(7, end=True) + headers(101, end=True), ErrorCode.NO_ERROR),
]


@cases(FINE)
def test_what_looks_odd_and_is_allowed(case: Case) -> None:
    link = server()
    link.receive(case.raw)
    assert not link.conn.closed
    assert not [f for f in sent(link.conn) if f.kind in (GOAWAY, RST_STREAM) and f.code]


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        frames.PREFACE[:-1] + b"X",
        frames.PREFACE + frames.ping(bytes(8)),
        frames.PREFACE + frames.SETTINGS_ACK,
        frames.PREFACE + headers(1),
        frames.PREFACE + data(1, b"x"),
        frames.PREFACE + headers(1, more=True) + frame(CONTINUATION, 4, 1),
        frames.PREFACE + frames.window_update(0, 1),
    ],
    ids=["http1", "last-octet", "ping", "ack", "headers", "data", "continuation", "window"],
)
def test_a_connection_begins_with_preface_and_settings(raw: bytes) -> None:
    from mesh.wire.connection import Connection
    from mesh.wire.limits import PUBLIC
    from tests.wire.memory import Recording

    conn = Connection(Recording(), PUBLIC, client=False)
    conn.receive(raw, 0.0)
    assert conn.closed and sent(conn)[-1].code == PROTOCOL


def test_windows_overrun() -> None:
    """More than we have granted: the stream's window costs the stream, ours the connection."""
    link = server()
    link.owner.taking = False
    link.receive(headers(1))
    window = link.conn.stream_window
    whole, rest = divmod(window, 16_384)
    link.receive(data(1, bytes(16_384)) * whole + data(1, bytes(rest)))
    assert not link.conn.closed and not sent(link.conn, RST_STREAM)
    link.receive(data(1, b"x"))
    assert [(f.stream_id, f.code) for f in sent(link.conn, RST_STREAM)] == [(1, FLOW)]
    assert not link.conn.closed


def test_connection_window_overrun_within_one_read() -> None:
    """The connection's window is given back a read at a time; one read may not exceed it."""
    link = server()
    window = link.conn.recv_window
    opened = b"".join(headers(1 + 2 * i) for i in range(70))
    filled = b"".join(data(1 + 2 * i, bytes(16_384)) * 4 for i in range(70))
    assert len(filled) > window
    link.receive(opened + filled)
    assert sent(link.conn)[-1].code == FLOW and link.conn.closed
