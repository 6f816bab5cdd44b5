"""Bytes spliced by field numbers mean to protobuf what setting the field means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.errors import InvalidArgument
from mesh.oip.protobuf_fields import varint
from mesh.protobuf_path import DEPTH_MAX, FIELDS_MAX, extract, field_path, splice
from protos import oip_pb2 as oip

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
# Fields 900 to 1000, which no message here has, of every wire type that is not a group.
unknown_fields = st.lists(
    st.tuples(st.integers(900, 1000), st.sampled_from([0, 1, 2, 5]), st.binary(max_size=8)),
    max_size=4,
).map(lambda fields: b"".join(unknown(*one) for one in fields))


def unknown(number: int, kind: int, content: bytes) -> bytes:
    body = {
        0: varint(int.from_bytes(content, "big") >> 1),
        1: content.ljust(8, b"x"),
        2: varint(len(content)) + content,
        5: content.ljust(4, b"x")[:4],
    }[kind]
    return varint(number << 3 | kind) + body


@st.composite
def requests(draw: st.DrawFn) -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(
        model_name=draw(names), model_version=draw(names), id=draw(names)
    )
    for name in draw(st.lists(names, max_size=3)):
        message.inputs.add(name=name, shape=[1, 2], datatype="FP32")
    message.raw_input_contents.extend(draw(st.lists(st.binary(max_size=300), max_size=3)))
    return message


@given(requests(), names, unknown_fields, unknown_fields)
def test_a_spliced_name_is_the_name_and_all_else_stays(
    message: oip.ModelInferRequest, name: str, before: bytes, behind: bytes
) -> None:
    raw = before + message.SerializeToString() + behind
    spliced = splice(raw, (1,), name.encode())
    expected = oip.ModelInferRequest.FromString(raw)
    expected.model_name = name
    found = oip.ModelInferRequest.FromString(spliced)
    assert found == expected
    assert extract(spliced, (1,)) == name
    assert before in spliced
    assert spliced.endswith(behind)


@given(st.lists(requests(), min_size=1, max_size=3), names)
def test_parts_of_one_message_are_merged_as_protobuf_merges_them(
    parts: list[oip.ModelInferRequest], name: str
) -> None:
    raw = b"".join(
        oip.ModelStreamInferResponse(
            infer_response=oip.ModelInferResponse(model_name=part.model_name, id=part.id)
        ).SerializeToString()
        for part in parts
    )
    whole = oip.ModelStreamInferResponse.FromString(raw)
    assert (extract(raw, (2, 1)) or "") == whole.infer_response.model_name
    whole.infer_response.model_name = name
    assert oip.ModelStreamInferResponse.FromString(splice(raw, (2, 1), name.encode())) == whole


@given(st.lists(st.integers(1, 2**29 - 1), min_size=1, max_size=DEPTH_MAX), names)
def test_a_path_that_is_not_there_is_made(numbers: list[int], name: str) -> None:
    path = field_path(numbers, "here")
    raw = splice(b"", path, name.encode())
    assert extract(raw, path) == name
    assert splice(raw, path, b"x") == splice(b"", path, b"x")


@given(st.binary(max_size=200), st.sampled_from([(1,), (2, 1), (1, 1, 1)]))
def test_any_bytes_are_spliced_or_refused(data: bytes, path: tuple[int, ...]) -> None:
    try:
        raw = splice(data, path, b"id")
    except InvalidArgument:
        return
    assert extract(raw, path) == "id"


def test_an_answer_without_the_message_on_the_way_is_left_alone() -> None:
    raw = oip.ModelStreamInferResponse(error_message="no").SerializeToString()
    assert splice(raw, (2, 1), b"name", create_parents=False) == raw


def test_a_message_of_very_many_fields_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=f"more than {FIELDS_MAX} fields"):
        splice(b"\x10\x01" * (FIELDS_MAX + 1), (1,), b"id")


@pytest.mark.parametrize("numbers", [[], [0], [2**29], [True], ["1"], [1] * (DEPTH_MAX + 1)])
def test_what_is_no_path_is_refused_with_its_place(numbers: list[object]) -> None:
    with pytest.raises(InvalidArgument, match=r"^rpcConfigs: "):
        field_path(numbers, "rpcConfigs")
