"""gRPC messages out of any cut of the bytes, compression with its bounds, status messages."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import hpack as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.errors import (
    Code,
    Internal,
    MeshError,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from mesh.wire import messages
from mesh.wire.messages import Assembler

LIMIT = 10_000


def framed(message: bytes, encoding: bytes = b"identity") -> bytes:
    if encoding == b"identity":
        return messages.prefix(message) + message
    body = gzip.compress(message) if encoding == b"gzip" else zlib.compress(message)
    return b"\1" + len(body).to_bytes(4, "big") + body


@given(
    st.lists(st.binary(max_size=200), max_size=5),
    st.sampled_from([b"identity", b"gzip", b"deflate"]),
    st.lists(st.integers(0, 1_200), max_size=12),
    st.booleans(),
)
def test_any_cut_gives_the_same_messages(
    contents: list[bytes], encoding: bytes, cuts: list[int], as_views: bool
) -> None:
    raw = b"".join(framed(content, encoding) for content in contents)
    assembler = Assembler(LIMIT, encoding)
    got: list[bytes] = []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(raw)], strict=True):
        piece = raw[start:end]
        got += assembler.feed(memoryview(piece) if as_views else piece)
    assert got == contents and not assembler.incomplete


@given(st.binary(min_size=1, max_size=100), st.data())
def test_it_knows_that_it_is_inside_a_message(content: bytes, draw: st.DataObject) -> None:
    raw = framed(content)
    cut = draw.draw(st.integers(1, len(raw) - 1))
    assembler = Assembler(LIMIT, b"identity")
    assert assembler.feed(raw[:cut]) == [] and assembler.incomplete
    assert assembler.feed(raw[cut:]) == [content] and not assembler.incomplete


def test_byte_by_byte() -> None:
    assembler = Assembler(LIMIT, b"identity")
    got = [m for octet in framed(b"") + framed(b"abc") for m in assembler.feed(bytes((octet,)))]
    assert got == [b"", b"abc"]


def test_a_message_of_exactly_the_limit_and_one_more() -> None:
    assert Assembler(LIMIT, b"identity").feed(framed(bytes(LIMIT))) == [bytes(LIMIT)]
    with pytest.raises(ResourceExhausted, match=r"10001 bytes .* limit of 10000"):
        Assembler(LIMIT, b"identity").feed(framed(bytes(LIMIT + 1))[:5])


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_inflated_size_is_what_counts(encoding: bytes) -> None:
    assert Assembler(LIMIT, encoding).feed(framed(bytes(LIMIT), encoding)) == [bytes(LIMIT)]
    with pytest.raises(ResourceExhausted):
        Assembler(LIMIT, encoding).feed(framed(bytes(LIMIT + 1), encoding))


def test_a_bomb_is_not_inflated() -> None:
    bomb = framed(bytes(100_000_000), b"gzip")
    limit = 1 << 20
    tracemalloc.start()
    with pytest.raises(ResourceExhausted):
        Assembler(limit, b"gzip").feed(bomb)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 * limit


def test_an_announced_message_takes_no_memory_before_it_comes() -> None:
    limit = 1 << 24
    assemblers = [Assembler(limit, b"identity") for _ in range(50)]
    tracemalloc.start()
    for assembler in assemblers:
        assembler.feed(b"\0" + limit.to_bytes(4, "big") + b"x")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(
    ("raw", "encoding", "error"),
    [
        (b"\2\0\0\0\0", b"gzip", Internal),
        (b"\1\0\0\0\1x", b"identity", Internal),
        (b"\1\0\0\0\1x", b"snappy", Unimplemented),
        (b"\1\0\0\0\1x", b"gzip", Internal),
        (b"\1\0\0\0\0", b"gzip", Internal),
        (framed(b"", b"gzip").replace(b"\1", b"\1", 1)[:-4], b"gzip", None),
    ],
    ids=["flag", "identity", "unknown", "broken", "empty", "incomplete"],
)
def test_broken_messages(raw: bytes, encoding: bytes, error: type[MeshError] | None) -> None:
    assembler = Assembler(LIMIT, encoding)
    if error is None:
        assert assembler.feed(raw) == [] and assembler.incomplete
        return
    with pytest.raises(error):
        assembler.feed(raw)


@pytest.mark.parametrize("change", ["cut", "more"])
@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_compressed_data_must_end_where_the_message_does(encoding: bytes, change: str) -> None:
    body = framed(b"content", encoding)[5:]
    body = body[:-1] if change == "cut" else body + b"?"
    with pytest.raises(Internal):
        messages.decompress(body, encoding, LIMIT)


@given(st.text(max_size=300))
def test_status_messages_survive(text: str) -> None:
    encoded = messages.percent_encode(text)
    assert all(0x20 <= octet <= 0x7E for octet in encoded)
    assert encoded == encoded.strip(b" ")
    assert messages.percent_decode(encoded) == text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("char", ["x", "%", "é", "漢", "😀", " ", "\n"])
def test_a_long_status_message_is_cut_between_characters(char: str) -> None:
    encoded = messages.percent_encode(char * 100_000)
    assert 4_000 < len(encoded) <= 4_100
    decoded = messages.percent_decode(encoded)
    assert decoded and set(decoded) == {char}


def test_whatever_a_peer_writes_into_a_status_message_is_shown_somehow() -> None:
    assert messages.percent_decode(b"a%2") == "a%2"
    assert messages.percent_decode(b"%zz\xff") != ""
    assert messages.percent_decode(b"%ff%fe") == "\ufffd\ufffd"


def test_trailers_of_an_error() -> None:
    error = Unavailable("später", retry_after_ms=250)
    block = messages.trailers_only(messages.error_trailers(error, [("x-why", "because")]))
    assert list(oracle.Decoder().decode(block, raw=True)) == [
        (b":status", b"200"),
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"14"),
        (b"grpc-message", b"sp%C3%A4ter"),
        (b"grpc-retry-pushback-ms", b"250"),
        (b"x-why", b"because"),
    ]


def test_an_error_that_is_final_gives_no_hint_to_retry() -> None:
    block = messages.error_trailers(MeshError("no", code=Code.NOT_FOUND, retry_after_ms=5))
    assert b"pushback" not in block


@pytest.mark.parametrize(
    ("status", "http", "code"),
    [
        (0, 200, Code.OK),
        (16, 200, Code.UNAUTHENTICATED),
        (17, 200, Code.UNKNOWN),
        (None, 503, Code.UNAVAILABLE),
        (None, 404, Code.UNIMPLEMENTED),
        (None, 200, Code.UNKNOWN),
        (None, None, Code.UNKNOWN),
    ],
)
def test_the_code_of_any_reply(status: int | None, http: int | None, code: Code) -> None:
    assert messages.code_of(status, http) is code
