"""What the codec remembers never changes an answer: it equals a codec that remembers nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.core.errors import InvalidArgument, MeshError
from mesh.oip import tensors
from mesh.oip.tensors import REMEMBERED_BYTES_MAX, InferCodec
from mesh.runtimes.api import Tensor
from protos import oip_pb2

from .messages import comparable, metadata, request

MODEL = metadata({"a": ("FP32", [-1, 2]), "b": ("INT64", [-1])}, {"y": ("FP32", [-1])})
SINGLE = metadata({"a": ("FP32", [-1, 2])}, {"y": ("FP32", [-1])})


def outcome(codec: InferCodec, message: bytes) -> Any:
    try:
        return comparable(codec.decode(message))
    except MeshError as error:
        return type(error), error.message


def message(batch: int, request_id: str, inputs: int, version: str = "") -> bytes:
    draw = np.random.default_rng(batch)
    tensors_ = {"a": ("FP32", draw.standard_normal((batch, 2)).astype(np.float32))}
    if inputs == 2:
        tensors_["b"] = ("INT64", draw.integers(0, 9, batch))
    return request(tensors_, raw=True, id=request_id, model_version=version).SerializeToString()


messages = st.builds(
    message,
    batch=st.integers(1, 3),
    request_id=st.sampled_from(["", "a", "b", "é", "xyz"]),
    inputs=st.integers(1, 2),
)


@st.composite
def disturbed(draw: st.DrawFn) -> bytes:
    """A message with some bytes changed, so that it agrees with a remembered one almost."""
    data = bytearray(draw(messages))
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(
            st.sampled_from([0, 1, 2, 0x0A, 0x1A, 0x22, 0x3A, 0x7F, 0x80, 0xFF])
        )
    return bytes(data)


@pytest.mark.parametrize("model", [MODEL, SINGLE], ids=["two inputs", "one input"])
@settings(max_examples=200)
@given(st.lists(st.one_of(messages, disturbed()), min_size=2, max_size=8))
@example([message(1, "ab", 1), message(1, "ab", 1).replace(b"ab", b"\xff\xfe")])
@example([message(1, "ab", 1), message(1, "", 1, "ab"), message(1, "ab", 1)])
def test_a_codec_that_remembers_answers_like_a_new_one(model: Any, sent: list[bytes]) -> None:
    warm = InferCodec(model)
    for data in sent:
        assert outcome(warm, data) == outcome(InferCodec(model), data)


@pytest.mark.parametrize("request_id", ["", "0123456789abcdef"])
@pytest.mark.parametrize("inputs", [1, 2])
def test_an_equal_message_is_not_parsed_again(request_id: str, inputs: int) -> None:
    """Seen from outside: the head is the very object that the first message made."""
    codec = InferCodec(MODEL if inputs == 2 else SINGLE)
    first = codec.decode(message(2, request_id, inputs))
    other_id = request_id[::-1]
    again = codec.decode(message(2, other_id, inputs))
    assert again.head is first.head
    assert again.id == other_id


def test_what_it_remembers_is_bounded() -> None:
    codec = InferCodec(SINGLE)
    array = np.ones((1, 2), np.float32)
    most_bytes = most_entries = 0
    for number in range(500):
        sent = request({"a": ("FP32", array)}, raw=True)
        sent.parameters[f"parameter-{number:04d}"].string_param = "v" * 100
        call = codec.decode(sent.SerializeToString())
        assert call.parameters == {f"parameter-{number:04d}": "v" * 100}
        codec.encode(call, [Tensor("y", "FP32", np.ones(number, np.float32))], "m")
        kept = [key for layout in codec._layouts.values() for key in layout.templates]
        most_bytes = max(most_bytes, sum(map(len, kept)))
        most_entries = max(most_entries, len(kept) + len(codec._replies))
    assert 0 < most_bytes < REMEMBERED_BYTES_MAX
    assert 1 < most_entries < REMEMBERED_BYTES_MAX / 256


def test_a_long_head_is_not_remembered() -> None:
    codec = InferCodec(SINGLE)
    sent = request({"a": ("FP32", np.ones((1, 2), np.float32))}, raw=True)
    sent.parameters["p"].string_param = "v" * tensors.HEAD_BYTES_MAX
    codec.decode(sent.SerializeToString())
    assert not codec._layouts


def test_raw_contents_before_the_inputs_are_understood() -> None:
    """Fields may come in any order; only a canonical message is remembered."""
    array = np.array([[1, 2]], np.float32)
    sent = request({"a": ("FP32", array)}, raw=True)
    tail = oip_pb2.ModelInferRequest(raw_input_contents=[array.tobytes()]).SerializeToString()
    del sent.raw_input_contents[:]
    codec = InferCodec(SINGLE)
    for _ in range(2):
        call = codec.decode(tail + sent.SerializeToString())
        np.testing.assert_array_equal(call.inputs["a"], array)


def test_replies_of_other_shapes_names_and_ids_do_not_mix() -> None:
    codec = InferCodec(SINGLE)
    for request_id in ("", "one", "", "two"):
        call = codec.decode(message(1, request_id, 1))
        for name in ("m", "alias"):
            for shape in ((1, 3), (3, 1), (3,)):
                reply = oip_pb2.ModelInferResponse.FromString(
                    codec.encode(call, [Tensor("y", "FP32", np.ones(shape, np.float32))], name)
                )
                assert (reply.id, reply.model_name) == (request_id, name)
                assert tuple(reply.outputs[0].shape) == shape
                assert list(reply.raw_output_contents) == [np.ones(3, "<f4").tobytes()]


ANSWERS = [
    Tensor("y", "UINT16", np.array([1], "u2")),
    Tensor("z", "UINT16", np.array([2], "u2")),
    Tensor("y", "BF16", np.array([3], "u2")),
    Tensor("y", "UINT16", np.array([4], "i8")),  # to be converted
    Tensor("y", "UINT16", np.array([5, 6], "u2")),
    Tensor("y", "UINT16", np.array([], "u2")),
    Tensor("y", "BYTES", np.array([b"7"], object)),
]
PLAIN = message(1, "", 1)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([PLAIN, PLAIN, message(1, "i" * 130, 1), message(1, "", 1, "2")]),
            st.sampled_from(ANSWERS),
            st.sampled_from(["m", "n"]),
            st.sampled_from([None, None, "7"]),
        ),
        min_size=2,
        max_size=8,
    )
)
def test_a_reply_after_others_is_as_a_new_codec_writes_it(sent: list[Any]) -> None:
    model = metadata({"a": ("FP32", [-1, 2])}, versions=("1", "2"))
    codec = InferCodec(model)
    for asked, answer, name, version in [sent[0], sent[0], *sent]:
        made = codec.encode(codec.decode(asked), [answer], name, version)
        fresh = InferCodec(model)
        assert made == fresh.encode(fresh.decode(asked), [answer], name, version)


def test_arrays_are_aligned_for_their_datatype() -> None:
    for length in range(1, 9):
        codec = InferCodec(MODEL)
        data = message(1, "i" * length, 2)
        for _ in range(2):
            assert all(array.flags.aligned for array in codec.decode(data).inputs.values())


def test_garbage_is_an_invalid_argument() -> None:
    with pytest.raises(InvalidArgument, match="no ModelInferRequest"):
        InferCodec(SINGLE).decode(b"\x0a\xff\xff")
