"""However the bytes are cut into reads, the streams are told the same."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import hpack as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.wire import frames, hpack
from mesh.wire.connection import Connection
from mesh.wire.frames import CONTINUATION, DATA, HAS_PRIORITY, HEADERS, PADDED
from mesh.wire.limits import PUBLIC
from tests.wire.memory import (
    OK_BLOCK,
    REPLY,
    REPLY_BLOCK,
    REQUEST,
    REQUEST_BLOCK,
    Recording,
    data,
    frame,
    headers,
    parse,
    server,
)

LIMITS = replace(PUBLIC, pings_per_10s=10**6, settings_per_10s=10**6)


def joined(log: list[tuple[Any, ...]]) -> dict[int, list[tuple[Any, ...]]]:
    """Per stream, with neighbouring pieces of DATA as one."""
    streams: dict[int, list[tuple[Any, ...]]] = {}
    for stream_id, *event in log:
        events = streams.setdefault(stream_id, [])
        if event[0] == "data" and events and events[-1][0] == "data" and not events[-1][2]:
            events[-1] = ("data", events[-1][1] + event[1], event[2])
        elif event[0] != "data" or event[1] or event[2]:
            events.append(tuple(event))
    return streams


def outcome(raw: bytes, cuts: list[int], *, client: bool, views: bool) -> tuple[Any, ...]:
    owner = Recording()
    conn = Connection(owner, LIMITS, client=client)
    if client:
        conn.receive(frames.settings({}), 0.0)
        for _ in range(3):
            owner.open(conn).send_headers(REQUEST_BLOCK, True)
    else:
        raw = frames.PREFACE + frames.settings({}) + raw
    edges = sorted({cut % (len(raw) + 1) for cut in cuts} | {0, len(raw)})
    for start, end in itertools.pairwise(edges):
        piece = raw[start:end]
        conn.receive(memoryview(bytearray(piece)) if views else piece, 0.0)
    sent = parse(b"".join(conn.take_output()))
    resets = [(f.stream_id, f.code) for f in sent if f.kind == frames.RST_STREAM]
    error = conn.error and (conn.error.code, conn.error.message)
    acks = sum(f.kind == frames.PING for f in sent)
    return joined(owner.log), error, resets, acks, set(conn.streams), owner.goaways


def padded(stream_id: int, payload: bytes, padding: int, *, end: bool) -> bytes:
    body = bytes((padding,)) + payload + bytes(padding)
    return frame(DATA, PADDED | (1 if end else 0), stream_id, body)


_BODY = st.integers(0, 6_000).map(lambda n: (bytes(range(256)) * 24)[:n])
_ID = st.sampled_from([1, 3, 5])


@st.composite
def request_frames(draw: st.DrawFn) -> bytes:
    """What a client sends: mostly right, now and then not."""
    encoder = oracle.Encoder()
    out = b""
    for _ in range(draw(st.integers(1, 12))):
        stream_id = draw(_ID)
        end = draw(st.booleans())
        kind = draw(st.sampled_from("HHHDDDDDPPWSRTGXC"))
        if kind == "H":
            extra = draw(st.sampled_from([(), ((b"x-a", b"1"),), ((b"x-b", b"2" * 40),)]))
            block = draw(
                st.sampled_from([REQUEST_BLOCK, encoder.encode([*REQUEST, *extra]), OK_BLOCK])
            )
            cut = draw(st.integers(0, len(block)))
            shape = draw(st.sampled_from(["whole", "continued", "padded", "priority"]))
            flag = 1 if end else 0
            if shape == "whole":
                out += headers(stream_id, block, end=end)
            elif shape == "continued":
                out += frame(HEADERS, flag, stream_id, block[:cut])
                out += frame(CONTINUATION, 0, stream_id, b"")
                out += frame(CONTINUATION, 4, stream_id, block[cut:])
            elif shape == "padded":
                body = b"\x07" + block + bytes(7)
                out += frame(HEADERS, 4 | flag | PADDED, stream_id, body)
            else:
                body = bytes(5) + block
                out += frame(HEADERS, 4 | flag | HAS_PRIORITY, stream_id, body)
        elif kind == "D":
            out += data(stream_id, draw(_BODY), end=end)
        elif kind == "P":
            out += padded(stream_id, draw(_BODY), draw(st.integers(0, 255)), end=end)
        elif kind == "W":
            out += frames.window_update(draw(st.sampled_from([0, stream_id])), 100)
        elif kind == "S":
            out += frames.settings({4: draw(st.integers(0, 100_000))})
        elif kind == "R":
            out += frames.rst_stream(stream_id, 8)
        elif kind == "T":
            out += headers(stream_id, OK_BLOCK, end=True)
        elif kind == "G":
            out += frames.goaway(0, 0, b"debug")
        elif kind == "C":
            out += frames.ping(b"12345678")
        else:
            out += frame(0xFA, 0xFF, stream_id, b"unknown")
    return out


@st.composite
def reply_frames(draw: st.DrawFn) -> bytes:
    """What a server sends on streams 1, 3 and 5."""
    encoder = oracle.Encoder()
    out = b""
    for stream_id in (1, 3, 5):
        block = draw(st.sampled_from([REPLY_BLOCK, encoder.encode(REPLY)]))
        informational = hpack.encode([(b":status", b"100")])
        if draw(st.booleans()):
            out += headers(stream_id, informational)
        out += headers(stream_id, block)
        for _ in range(draw(st.integers(0, 4))):
            piece = draw(_BODY)
            out += (
                padded(stream_id, piece, draw(st.integers(0, 255)), end=False)
                if draw(st.booleans())
                else data(stream_id, piece)
            )
        out += draw(
            st.sampled_from(
                [
                    headers(stream_id, OK_BLOCK, end=True),
                    frames.rst_stream(stream_id, 7),
                    data(stream_id, b"", end=True),
                    b"",
                ]
            )
        )
    return out + draw(st.sampled_from([b"", frames.goaway(3, 0), headers(1, OK_BLOCK, end=True)]))


CUTS = st.lists(st.integers(0, 100_000), max_size=12)


@given(request_frames(), CUTS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_cut_of_requests(raw: bytes, cuts: list[int], views: bool) -> None:
    whole = outcome(raw, [], client=False, views=False)
    assert outcome(raw, cuts, client=False, views=views) == whole


@given(reply_frames(), CUTS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_cut_of_replies(raw: bytes, cuts: list[int], views: bool) -> None:
    whole = outcome(raw, [], client=True, views=False)
    assert outcome(raw, cuts, client=True, views=views) == whole


@pytest.mark.parametrize("views", [False, True], ids=["bytes", "views"])
def test_octet_by_octet(views: bool) -> None:
    body = bytes(range(256)) * 3
    raw = b"".join(
        [
            headers(1),
            data(1, body[:300]),
            padded(1, body[300:400], 30, end=False),
            padded(1, b"", 255, end=False),
            data(1, b""),
            frame(HEADERS, 0, 3, REQUEST_BLOCK[:10]),
            frame(CONTINUATION, 4, 3, REQUEST_BLOCK[10:]),
            padded(1, body[400:], 0, end=True),
            data(3, b"x", end=True),
        ]
    )
    whole = outcome(raw, [], client=False, views=False)
    assert outcome(raw, list(range(len(raw) + 200)), client=False, views=views) == whole
    events = whole[0][1]
    assert events[0][0] == "request" and events[1] == ("data", body, True)


def test_runs_of_full_frames_in_one_large_read() -> None:
    """The quick way for large messages tells the same as frame by frame."""
    pieces = [bytes([i]) * 16_384 for i in range(10)]
    raw = headers(1) + b"".join(data(1, p) for p in pieces[:8])
    raw += headers(3) + data(1, pieces[8]) + data(3, pieces[9], end=True) + data(1, b"", end=True)
    quick = outcome(raw, [], client=False, views=True)
    assert quick == outcome(raw, list(range(0, len(raw), 1_000)), client=False, views=False)
    assert quick[0][1][1] == ("data", b"".join(pieces[:9]), True)


def test_runs_of_two_streams_are_kept_apart() -> None:
    raw = headers(1) + headers(3)
    for turn in range(6):
        raw += (
            data(1, bytes([turn]) * 8_000) + data(1, b"1" * 5_000) + data(3, bytes([turn]) * 9_000)
        )
    raw += data(1, b"", end=True) + data(3, b"", end=True)
    quick = outcome(raw, [], client=False, views=True)
    assert quick == outcome(raw, list(range(0, len(raw), 777)), client=False, views=False)
    assert len(quick[0][1][1][1]) == 6 * 13_000 and len(quick[0][3][1][1]) == 6 * 9_000


def test_a_known_block_means_something_else_when_the_table_has_changed() -> None:
    """Blocks are cached by their bytes; an index in them may come to name another field."""
    newest = REQUEST_BLOCK + b"\xbe"
    insert_a, insert_b = b"\x40\x03x-a\x011", b"\x40\x03x-b\x012"
    link = server()
    for turn, block in enumerate(
        [REQUEST_BLOCK + insert_a, newest, newest, REQUEST_BLOCK + insert_b, newest, newest]
    ):
        link.receive(headers(1 + 2 * turn, block, end=True))
    seen = [event[2][-1] for event in link.owner.log]
    assert seen == [(b"x-a", b"1")] * 3 + [(b"x-b", b"2")] * 3
