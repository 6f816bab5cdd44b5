"""The model's name out of a request's first bytes, with the real protobuf parser as oracle."""

from __future__ import annotations

import contextlib
import gzip
import zlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.errors import Internal, InvalidArgument, MeshError, ResourceExhausted, Unimplemented
from mesh.wire import messages
from mesh.wire.peek import peek_model_name
from protos import oip_pb2

LIMIT = 1 << 24


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def name_field(name: str) -> bytes:
    return field(1, name.encode())


_TENSOR = oip_pb2.ModelInferRequest.InferInputTensor(
    name="x", datatype="FP32", shape=[1, 3]
).SerializeToString()
_FIELDS = st.one_of(
    st.text(min_size=1, max_size=20).map(name_field),
    st.text(max_size=10).map(lambda text: field(2, text.encode())),
    st.text(max_size=10).map(lambda text: field(3, text.encode())),
    st.just(field(5, _TENSOR)),
    st.sampled_from([0, 100, 127, 128, 300, 20_000]).map(lambda n: field(7, bytes(n))),
    st.integers(0, 2**64 - 1).map(lambda n: varint(50 << 3) + varint(n)),
    st.binary(min_size=4, max_size=4).map(lambda raw: varint(51 << 3 | 5) + raw),
    st.binary(min_size=8, max_size=8).map(lambda raw: varint(52 << 3 | 1) + raw),
    st.binary(max_size=30).map(lambda raw: field(536_870_911, raw)),
    st.text(max_size=5).map(
        lambda text: varint(60 << 3 | 3) + name_field("inside " + text) + varint(60 << 3 | 4)
    ),
    st.just(varint(61 << 3 | 3) * 3 + varint(61 << 3 | 4) * 3),
    st.just(b"\x8a\x80\x00" + b"\x03abc"),  # field 1 with a tag longer than it need be
    st.just(b"\x0a\x83\x00" + b"abc"),  # and a length
)
REQUESTS = st.lists(_FIELDS, max_size=8).map(b"".join)


def parsed(raw: bytes) -> str | None:
    """What protobuf makes of it; None when it refuses."""
    try:
        return str(oip_pb2.ModelInferRequest.FromString(raw).model_name)
    except DecodeError:
        return None


def peek(raw: bytes, *, ended: bool = True) -> tuple[str | None, bool]:
    return peek_model_name(messages.prefix(raw) + raw, b"identity", LIMIT, ended=ended)


@given(REQUESTS)
@settings(max_examples=300)
def test_the_name_that_protobuf_reads(raw: bytes) -> None:
    name = parsed(raw)
    assert name is not None
    if name:
        assert peek(raw) == (name, True)
    else:
        with pytest.raises(InvalidArgument, match="names no model"):
            peek(raw)


@given(REQUESTS.filter(lambda raw: bool(parsed(raw))), st.data())
def test_a_cut_request_gives_a_name_that_was_there_or_asks_for_more(
    raw: bytes, draw: st.DataObject
) -> None:
    wire = messages.prefix(raw) + raw
    cut = draw.draw(st.integers(0, len(wire) - 1))
    name, whole = peek_model_name(wire[:cut], b"identity", LIMIT, ended=False)
    assert not whole
    if name is not None:
        assert name.encode() in wire[:cut]
    with pytest.raises(InvalidArgument, match="ended before"):
        peek_model_name(wire[:cut], b"identity", LIMIT, ended=True)


@given(REQUESTS.filter(lambda raw: bool(parsed(raw))), st.sampled_from([b"gzip", b"deflate"]))
def test_compressed(raw: bytes, encoding: bytes) -> None:
    body = gzip.compress(raw) if encoding == b"gzip" else zlib.compress(raw)
    wire = b"\1" + len(body).to_bytes(4, "big") + body
    assert peek_model_name(wire, encoding, LIMIT, ended=True) == (parsed(raw), True)


@given(st.binary(max_size=60))
@settings(max_examples=500)
def test_garbage_is_a_name_or_an_error(raw: bytes) -> None:
    try:
        name, _ = peek(raw)
    except MeshError:
        name = None
    expected = parsed(raw)
    if expected:
        assert name == expected


@given(st.binary(max_size=60), st.sampled_from([b"gzip", b"identity", b"x"]), st.booleans())
@settings(max_examples=300)
def test_garbage_of_any_kind(raw: bytes, encoding: bytes, ended: bool) -> None:
    with contextlib.suppress(MeshError):
        peek_model_name(raw, encoding, LIMIT, ended=ended)


def test_the_last_name_wins_and_a_later_one_may_still_come() -> None:
    raw = name_field("a") + field(7, bytes(1_000)) + name_field("b")
    wire = messages.prefix(raw) + raw
    assert peek(raw) == ("b", True)
    assert peek_model_name(wire[:500], b"identity", LIMIT, ended=False) == ("a", False)


def test_a_large_tensor_in_front_is_waited_for() -> None:
    raw = field(7, bytes(100_000)) + name_field("late")
    wire = messages.prefix(raw) + raw
    assert peek_model_name(wire[:50_000], b"identity", LIMIT, ended=False) == (None, False)
    assert peek_model_name(wire, b"identity", LIMIT, ended=False) == ("late", True)


@pytest.mark.parametrize("incompressible", [False, True])
def test_the_beginning_of_a_large_compressed_request(incompressible: bool) -> None:
    """The first field that is not complete must not pass for a broken message."""
    import random

    tensor = random.Random(1).randbytes(200_000) if incompressible else bytes(5_000_000)
    body = gzip.compress(name_field("big") + field(7, tensor))
    wire = b"\1" + len(body).to_bytes(4, "big") + body
    beginning = wire[: min(len(wire) - 1, 16_384)]
    assert peek_model_name(beginning, b"gzip", LIMIT, ended=False) == ("big", False)
    name, whole = peek_model_name(wire, b"gzip", LIMIT, ended=True)
    assert name == "big" and whole is incompressible


def test_a_compressed_request_over_the_limit_is_not_inflated_by_the_peek() -> None:
    body = gzip.compress(name_field("bomb") + field(7, bytes(50_000_000)))
    wire = b"\1" + len(body).to_bytes(4, "big") + body
    assert peek_model_name(wire, b"gzip", LIMIT, ended=True) == ("bomb", False)


@pytest.mark.parametrize(
    ("wire", "encoding", "error"),
    [
        (b"\0" + (LIMIT + 1).to_bytes(4, "big"), b"identity", ResourceExhausted),
        (b"\1\0\0\0\1x", b"br", Unimplemented),
        (b"\1\0\0\0\3xyz", b"gzip", Internal),
        (b"\7\0\0\0\1x", b"gzip", Internal),
        (messages.prefix(b"\x0a\x05ab") + b"\x0a\x05ab", b"identity", InvalidArgument),
        (messages.prefix(b"\x0a\x01\xff") + b"\x0a\x01\xff", b"identity", InvalidArgument),
        (messages.prefix(b"\x0c") + b"\x0c", b"identity", InvalidArgument),
        (messages.prefix(b"\x0b\x14") + b"\x0b\x14", b"identity", InvalidArgument),
        (messages.prefix(b"\x0f") + b"\x0f", b"identity", InvalidArgument),
        (messages.prefix(b"\x0b" * 200) + b"\x0b" * 200, b"identity", InvalidArgument),
        (messages.prefix(b"\xff" * 20) + b"\xff" * 20, b"identity", InvalidArgument),
        (messages.prefix(b"\x0a\x00") + b"\x0a\x00", b"identity", InvalidArgument),
    ],
    ids=[
        "over-the-limit",
        "unknown-compression",
        "broken-gzip",
        "flag",
        "name-cut",
        "not-utf-8",
        "group-end",
        "group-mismatch",
        "wire-type",
        "deep-groups",
        "endless-varint",
        "empty-name",
    ],
)
def test_requests_without_a_route(wire: bytes, encoding: bytes, error: type[MeshError]) -> None:
    with pytest.raises(error):
        peek_model_name(wire, encoding, LIMIT, ended=True)
