"""Our connection and that of the `h2` library talk to each other in memory."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.wire import frames, hpack
from mesh.wire.connection import Connection
from mesh.wire.limits import PUBLIC, Limits
from tests.wire.memory import OK, OK_BLOCK, REPLY, REPLY_BLOCK, REQUEST, REQUEST_BLOCK, Recording

Codes = h2.settings.SettingCodes


class Pair:
    """One of ours and one of theirs; ``turn`` carries bytes until both are silent."""

    def __init__(self, *, ours_is_client: bool, limits: Limits = PUBLIC) -> None:
        self.owner = Recording()
        self.ours = Connection(self.owner, limits, client=ours_is_client)
        self.theirs = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=not ours_is_client, header_encoding=None, validate_inbound_headers=True
            )
        )
        self.theirs.initiate_connection()
        self.events: list[Any] = []
        self.granting = True  # their application takes what it gets
        self.turn()

    def turn(self, step: int = 0) -> None:
        while True:
            raw = b"".join(self.ours.take_output())
            if raw:
                events = self.theirs.receive_data(raw)
                self.events += events
                for event in events:
                    if self.granting and isinstance(event, h2.events.DataReceived):
                        self.grant(event.flow_controlled_length, event.stream_id)
            answer = self.theirs.data_to_send()
            if not raw and not answer:
                return
            for start in range(0, len(answer), step or len(answer) or 1):
                self.ours.receive(answer[start : start + (step or len(answer))], 0.0)

    def grant(self, size: int, stream_id: int) -> None:
        if size:
            with contextlib.suppress(h2.exceptions.StreamClosedError):
                self.theirs.acknowledge_received_data(size, stream_id)

    def of(self, kind: type[Any], stream_id: int | None = None) -> list[Any]:
        return [
            event
            for event in self.events
            if isinstance(event, kind) and (stream_id is None or event.stream_id == stream_id)
        ]

    def data(self, stream_id: int) -> bytes:
        return b"".join(event.data for event in self.of(h2.events.DataReceived, stream_id))


@pytest.fixture
def served() -> Pair:
    """Their client, our server."""
    return Pair(ours_is_client=False)


@pytest.fixture
def called() -> Pair:
    """Our client, their server."""
    return Pair(ours_is_client=True)


def test_settings_are_agreed(served: Pair) -> None:
    remote = served.theirs.remote_settings
    assert remote.max_concurrent_streams == PUBLIC.max_concurrent_streams
    assert remote.initial_window_size == PUBLIC.stream_window_bytes
    assert remote.max_header_list_size == PUBLIC.max_header_list_bytes
    assert served.theirs.outbound_flow_control_window == PUBLIC.connection_window_bytes
    assert served.of(h2.events.SettingsAcknowledged)


def test_a_call_served(served: Pair) -> None:
    served.theirs.send_headers(1, list(REQUEST))
    served.theirs.send_data(1, b"request", end_stream=True)
    served.turn()
    assert served.owner.log == [(1, "request", REQUEST, False), (1, "data", b"request", True)]
    stream = served.owner.streams[1]
    stream.send_headers(REPLY_BLOCK, False)
    stream.send_data(b"reply", False)
    stream.send_trailers(OK_BLOCK)
    served.turn()
    assert served.of(h2.events.ResponseReceived)[0].headers == list(REPLY)
    assert served.data(1) == b"reply"
    assert served.of(h2.events.TrailersReceived)[0].headers == list(OK)
    assert served.of(h2.events.StreamEnded) and not served.ours.streams


def test_a_call_made(called: Pair) -> None:
    stream = called.owner.open(called.ours)
    stream.send_headers(REQUEST_BLOCK, False)
    stream.send_data(b"request", True)
    called.turn()
    assert called.of(h2.events.RequestReceived)[0].headers == list(REQUEST)
    assert called.data(1) == b"request" and called.of(h2.events.StreamEnded)
    called.theirs.send_headers(1, list(REPLY))
    called.theirs.send_data(1, b"reply", pad_length=11)
    called.theirs.send_headers(1, list(OK), end_stream=True)
    called.turn()
    assert stream.events == [
        ("reply", REPLY, False),
        ("data", b"reply", False),
        ("reply", OK, True),
    ]
    assert not called.ours.streams


def test_trailers_only(called: Pair) -> None:
    stream = called.owner.open(called.ours)
    stream.send_headers(REQUEST_BLOCK, True)
    called.turn()
    called.theirs.send_headers(1, [*REPLY, *OK], end_stream=True)
    called.turn()
    assert stream.events == [("reply", (*REPLY, *OK), True)]


def test_informational_headers(called: Pair) -> None:
    stream = called.owner.open(called.ours)
    stream.send_headers(REQUEST_BLOCK, True)
    called.turn()
    called.theirs.send_headers(1, [(b":status", b"103"), (b"link", b"x")])
    called.theirs.send_headers(1, list(REPLY))
    called.theirs.send_headers(1, list(OK), end_stream=True)
    called.turn()
    assert stream.names == ["reply"] * 3


@pytest.mark.parametrize("step", [0, 1, 7_001])
@pytest.mark.parametrize("size", [65_535, 65_536, 1_000_000])
def test_large_data_both_ways(step: int, size: int) -> None:
    served = Pair(ours_is_client=False)
    body = (bytes(range(256)) * 4_000)[:size]
    served.theirs.send_headers(1, list(REQUEST))
    left = body
    while left:
        room = min(served.theirs.local_flow_control_window(1), 16_384, len(left))
        if room == 0:
            served.turn(step)
            assert served.theirs.local_flow_control_window(1), "their window was not refilled"
            continue
        served.theirs.send_data(1, left[:room], end_stream=room == len(left))
        left = left[room:]
    served.turn(step)
    stream = served.owner.streams[1]
    assert stream.received == body
    stream.send_headers(REPLY_BLOCK, False)
    stream.send_data(body, False)
    stream.send_trailers(OK_BLOCK)
    served.turn(step)
    assert served.data(1) == body and served.of(h2.events.TrailersReceived)


def test_a_reader_that_takes_nothing_stalls_only_its_stream(served: Pair) -> None:
    served.theirs.increment_flow_control_window(10_000_000)
    for stream_id in (1, 3):
        served.theirs.send_headers(stream_id, list(REQUEST), end_stream=True)
    served.turn()
    served.granting = False
    slow, other = served.owner.streams[1], served.owner.streams[3]
    slow.send_headers(REPLY_BLOCK, False)
    slow.send_data(bytes(500_000), True)
    other.send_headers(REPLY_BLOCK, False)
    other.send_data(bytes(60_000), True)
    served.turn()
    assert len(served.data(1)) == 65_535 and slow.queued_bytes == 500_000 - 65_535
    assert len(served.data(3)) == 60_000 and 3 not in served.ours.streams
    served.theirs.increment_flow_control_window(1_000_000, 1)
    served.turn()
    assert len(served.data(1)) == 500_000 and not served.ours.streams
    assert sum(event[1] for event in slow.events if event[0] == "drained") == 500_000


def test_an_initial_window_that_shrinks_below_what_is_under_way(served: Pair) -> None:
    served.granting = False
    served.theirs.send_headers(1, list(REQUEST), end_stream=True)
    served.turn()
    stream = served.owner.streams[1]
    stream.send_headers(REPLY_BLOCK, False)
    stream.send_data(bytes(30_000), False)
    served.turn()
    served.theirs.update_settings({Codes.INITIAL_WINDOW_SIZE: 1_000})
    served.turn()
    assert stream.send_window == 1_000 - 30_000
    stream.send_data(b"x" * 500, False)
    served.turn()
    assert len(served.data(1)) == 30_000
    served.theirs.increment_flow_control_window(29_000, 1)  # to exactly 0
    served.turn()
    assert len(served.data(1)) == 30_000
    served.theirs.update_settings({Codes.INITIAL_WINDOW_SIZE: 1_200})
    served.turn()
    assert len(served.data(1)) == 30_200
    stream.send_data(b"", True)  # behind what waits
    served.theirs.update_settings({Codes.INITIAL_WINDOW_SIZE: 2_000})
    served.turn()
    assert len(served.data(1)) == 30_500 and served.of(h2.events.StreamEnded)


def test_an_end_of_stream_needs_no_window(served: Pair) -> None:
    served.theirs.update_settings({Codes.INITIAL_WINDOW_SIZE: 0})
    served.theirs.send_headers(1, list(REQUEST), end_stream=True)
    served.turn()
    stream = served.owner.streams[1]
    stream.send_headers(REPLY_BLOCK, False)
    stream.send_data(b"", False)
    stream.send_data(b"", True)
    served.turn()
    assert served.of(h2.events.StreamEnded) and not served.ours.streams


def test_frames_as_large_as_they_allow(served: Pair) -> None:
    served.theirs.update_settings({Codes.MAX_FRAME_SIZE: 50_000})
    served.theirs.send_headers(1, list(REQUEST), end_stream=True)
    served.turn()
    stream = served.owner.streams[1]
    stream.send_headers(REPLY_BLOCK, False)
    stream.send_data(bytes(60_000), False)
    served.turn()
    assert [len(event.data) for event in served.of(h2.events.DataReceived)] == [50_000, 10_000]


@pytest.mark.parametrize("size", [0, 100, 4_095, 4_096, 65_536])
def test_any_header_table_size(size: int) -> None:
    for ours_is_client in (False, True):
        pair = Pair(ours_is_client=ours_is_client)
        pair.theirs.update_settings({Codes.HEADER_TABLE_SIZE: size})
        pair.turn()
        if ours_is_client:
            for stream_id in (1, 3):
                pair.owner.open(pair.ours).send_headers(REQUEST_BLOCK, True)
                pair.turn()
                assert pair.of(h2.events.RequestReceived, stream_id)
            continue
        for stream_id in (1, 3):
            pair.theirs.send_headers(stream_id, list(REQUEST), end_stream=True)
            pair.turn()
            pair.owner.streams[stream_id].send_headers(REPLY_BLOCK + OK_BLOCK, True)
            pair.turn()
            assert pair.of(h2.events.ResponseReceived, stream_id)


def test_a_unary_answer_in_one_piece_after_the_table_shrank() -> None:
    """The fast path must not forget the table size update that it owes."""
    from mesh.wire.server import Server, Unary

    server = Server({"/pkg.Service/Method": Unary(lambda call, message: call.reply(message))})
    pair = Pair(ours_is_client=False)
    pair.ours.owner = server
    pair.theirs.update_settings({Codes.HEADER_TABLE_SIZE: 0})
    pair.turn()
    for stream_id in (1, 3):
        pair.theirs.send_headers(stream_id, list(REQUEST))
        pair.theirs.send_data(stream_id, b"\0\0\0\0\x02hi", end_stream=True)
        pair.turn()
        assert pair.data(stream_id) == b"\0\0\0\0\x02hi"
        assert (b"grpc-status", b"0") in pair.of(h2.events.TrailersReceived, stream_id)[0].headers


@pytest.mark.parametrize("size", [100, 16_384, 16_385, 40_000])
def test_long_header_blocks_are_continued(size: int) -> None:
    wide = replace(
        PUBLIC, max_header_list_bytes=200_000, max_header_value_bytes=100_000, max_header_fields=500
    )
    called = Pair(ours_is_client=True, limits=wide)
    called.theirs.update_settings({Codes.MAX_HEADER_LIST_SIZE: 200_000})
    called.theirs.decoder.max_header_list_size = 200_000
    called.turn()
    stream = called.owner.open(called.ours)
    fields = [*REQUEST, (b"x-long", b"v" * size)]
    stream.send_headers(hpack.encode(fields), True)
    called.turn()
    assert called.of(h2.events.RequestReceived)[0].headers == fields
    answer = [*REPLY, *[(b"x-%d" % i, b"w" * 1_000) for i in range(size // 1_000)]]
    called.theirs.send_headers(1, answer)
    called.turn()
    assert stream.events == [("reply", tuple(answer), False)]


def test_resets_both_ways(served: Pair) -> None:
    for stream_id in (1, 3):
        served.theirs.send_headers(stream_id, list(REQUEST))
    served.turn()
    served.theirs.reset_stream(1, h2.errors.ErrorCodes.CANCEL)
    served.owner.streams[3].reset(frames.ErrorCode.INTERNAL_ERROR)
    served.theirs.send_data(3, b"under way")
    served.turn()
    assert served.owner.streams[1].events == [("reset", 8)]
    assert served.of(h2.events.StreamReset, 3)[0].error_code == 2
    assert not served.ours.streams and not served.ours.closed
    assert served.owner.streams[3].events == []


def test_an_answer_before_the_end_of_the_request(served: Pair) -> None:
    served.theirs.send_headers(1, list(REQUEST))
    served.turn()
    served.owner.streams[1].send_headers(REPLY_BLOCK + OK_BLOCK, True)
    served.theirs.send_data(1, bytes(1_000))
    served.turn()
    assert served.of(h2.events.ResponseReceived) and served.of(h2.events.StreamEnded)
    assert served.of(h2.events.StreamReset)[0].error_code == 0
    assert not served.ours.streams and not served.ours.closed


def test_goaway_from_them_refuses_what_they_have_not_seen(called: Pair) -> None:
    first, second = called.owner.open(called.ours), called.owner.open(called.ours)
    first.send_headers(REQUEST_BLOCK, True)
    second.send_headers(REQUEST_BLOCK, True)
    called.ours.receive(frames.goaway(1, 0), 0.0)
    assert second.events == [("reset", frames.ErrorCode.REFUSED_STREAM)] and first.events == []
    assert not called.ours.can_open and called.owner.goaways == 1
    called.ours.receive(b"".join(_reply(1)), 0.0)
    assert first.names == ["reply", "reply"] and not called.ours.streams


def _reply(stream_id: int) -> list[bytes]:
    from tests.wire.memory import headers

    return [headers(stream_id, REPLY_BLOCK), headers(stream_id, OK_BLOCK, end=True)]


def test_goaway_from_us_ends_theirs(served: Pair) -> None:
    served.theirs.send_headers(1, list(REQUEST))
    served.turn()
    served.ours.terminate(frames.ErrorCode.NO_ERROR, "closing")
    served.turn()
    (event,) = served.of(h2.events.ConnectionTerminated)
    assert (event.error_code, event.last_stream_id) == (0, 1)
    assert event.additional_data == b"closing"
    assert served.owner.streams[1].names == ["lost"]


def test_more_streams_than_allowed_are_refused(served: Pair) -> None:
    served.theirs.remote_settings.max_concurrent_streams = 10_000  # they do not listen
    served.theirs.remote_settings.acknowledge()
    for i in range(PUBLIC.max_concurrent_streams + 1):
        served.theirs.send_headers(1 + 2 * i, list(REQUEST))
    served.turn()
    assert len(served.ours.streams) == PUBLIC.max_concurrent_streams
    (event,) = served.of(h2.events.StreamReset)
    assert event.error_code == h2.errors.ErrorCodes.REFUSED_STREAM


def test_priority_and_padding_and_ping(served: Pair) -> None:
    served.theirs.send_headers(
        1, list(REQUEST), priority_weight=20, priority_depends_on=3, priority_exclusive=True
    )
    served.theirs.prioritize(1, weight=5)
    served.theirs.send_data(1, b"abc", pad_length=255)
    served.theirs.send_data(1, b"", pad_length=0)
    served.theirs.send_data(1, b"def", end_stream=True, pad_length=0)
    served.theirs.ping(b"12345678")
    served.turn()
    assert served.owner.streams[1].received == b"abcdef"
    assert served.of(h2.events.PingAckReceived)[0].ping_data == b"12345678"


_FIELD = st.tuples(
    st.from_regex(rb"\Ax-[a-z0-9]{1,20}\Z"),
    st.from_regex(rb"\A[!-~]([ -~]{0,60}[!-~])?\Z"),
)


@given(st.lists(st.lists(_FIELD, max_size=10), min_size=1, max_size=10))
@settings(max_examples=50, deadline=None)
def test_any_metadata_both_ways(calls: list[list[tuple[bytes, bytes]]]) -> None:
    """Header tables of both sides stay in step over a connection's life."""
    served = Pair(ours_is_client=False)
    for turn, extra in enumerate(calls):
        stream_id = 1 + 2 * turn
        served.theirs.send_headers(stream_id, [*REQUEST, *extra], end_stream=True)
        served.turn()
        assert served.owner.log[-1] == (stream_id, "request", (*REQUEST, *extra), True)
        assert served.owner.heads[stream_id].metadata == tuple(extra)
        stream = served.owner.streams[stream_id]
        stream.send_headers(hpack.encode([*REPLY, *extra]), False)
        stream.send_trailers(hpack.encode([*OK, *extra]))
        served.turn()
        assert served.of(h2.events.ResponseReceived)[-1].headers == [*REPLY, *extra]
        assert served.of(h2.events.TrailersReceived)[-1].headers == [*OK, *extra]
