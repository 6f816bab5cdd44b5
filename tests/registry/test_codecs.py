"""Records and keys survive the way into the store and back, and bad ones are named."""

from __future__ import annotations

import dataclasses
import json
import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.errors import InvalidArgument
from mesh.core.names import check_model_id
from mesh.core.types import (
    CopyRecord,
    CopyState,
    FailureRecord,
    InstanceRecord,
    InstanceState,
    ModelRecord,
    VModelRecord,
)
from mesh.registry import (
    MAX_NAME_CHARS,
    Family,
    Key,
    Record,
    RecordError,
    Uses,
    config_key,
    copies_prefix,
    copy_key,
    decode,
    decode_config,
    decode_uses,
    encode,
    encode_config,
    encode_last_used,
    failures_prefix,
    key_of,
    model_key,
    parse_key,
)

names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=MAX_NAME_CHARS // 4)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
integers = st.integers(0, 2**53)
labels = st.dictionaries(texts, texts, max_size=3)
extras = st.dictionaries(
    st.sampled_from(["new_field", "later", "x"]),
    st.one_of(integers, texts, st.lists(integers, max_size=2), st.none()),
    max_size=2,
)
versions = st.integers(1, 3)

models = st.builds(
    ModelRecord,
    model_id=names,
    model_type=texts,
    path=texts,
    key=texts,
    size_bytes_stated=st.none() | integers,
    size_bytes_measured=st.none() | integers,
    min_copies=integers,
    pinned=st.booleans(),
    max_concurrency=st.none() | integers,
    max_batch_size=st.none() | integers,
    max_batch_latency_ms=st.none() | integers,
    load_timeout_ms=st.none() | integers,
    idle_unload_ms=st.none() | integers,
    required_labels=st.lists(texts, max_size=3).map(tuple),
    preferred_labels=st.lists(texts, max_size=3).map(tuple),
    auto_delete=st.booleans(),
    labels=labels,
    created_at_ms=integers,
    last_used_at_ms=integers,
    version=versions,
    extra=extras,
)
vmodels = st.builds(
    VModelRecord,
    name=names,
    active_model_id=texts,
    target_model_id=texts,
    owner=texts,
    failed=texts,
    manifest=texts,
    updated_at_ms=integers,
    version=versions,
    extra=extras,
)
instances = st.builds(
    InstanceRecord,
    instance_id=names,
    address=texts,
    state=st.sampled_from(InstanceState),
    capacity_bytes=integers,
    used_bytes=integers,
    model_types=st.lists(texts, max_size=3).map(tuple),
    labels=st.lists(texts, max_size=3).map(tuple),
    zone=texts,
    group=texts,
    replica_set=texts,
    victim_score=st.floats(0.0, 1e7),
    version=versions,
    extra=extras,
)
copies = st.builds(
    CopyRecord,
    model_id=names,
    instance_id=names,
    state=st.sampled_from(CopyState),
    size_bytes=integers,
    claimed_at_ms=integers,
    loaded_at_ms=integers,
    pinned=st.booleans(),
    version=versions,
    extra=extras,
)
failures = st.builds(
    FailureRecord,
    model_id=names,
    instance_id=names,
    code=st.sampled_from(["UNAVAILABLE", "FAILED_PRECONDITION"]),
    message=texts,
    failed_at_ms=integers,
    expires_at_ms=integers,
    version=versions,
    extra=extras,
)


@given(st.one_of(models, vmodels, instances, copies, failures))
def test_every_record_survives_the_way_there_and_back(record: Record) -> None:
    assert decode(key_of(record), encode(record)) == record


@given(names, names)
def test_every_name_survives_in_a_key(model_id: str, instance_id: str) -> None:
    key = copy_key(model_id, instance_id)
    assert key.isascii() and key.count("/") == 2
    assert parse_key(key) == Key(Family.COPY, model_id, instance_id)
    assert key.startswith(copies_prefix(model_id))


@given(names, names)
def test_no_model_lies_under_another_ones_prefix(one: str, other: str) -> None:
    inside = copy_key(other, "i").startswith(copies_prefix(one))
    assert inside is (one == other)


def test_the_keys_are_those_of_the_architecture() -> None:
    assert model_key("a/b") == "models/a%2Fb"
    assert copies_prefix("m") == "copies/m/"
    assert failures_prefix("m x") == "failures/m%20x/"
    assert key_of(FailureRecord("m", "i", "UNAVAILABLE", "", 0, 0)) == "failures/m/i"
    assert key_of(VModelRecord("v", "a", "a")) == "vmodels/v"
    assert key_of(InstanceRecord("i", "h:1", InstanceState.READY, 1)) == "instances/i"
    assert parse_key("leader") == Key(Family.LEADER)
    assert parse_key("lastused/i") == Key(Family.LAST_USED, "i")


@pytest.mark.parametrize(
    "key",
    [
        *("", "/", "models", "models/", "models/a/b", "copies/a", "copies/a/b/c", "copies//b"),
        *("x/y", "leader/x", "leaderboard", "demand/onnx"),
    ],
)
def test_keys_that_are_not_ours_are_nobodys(key: str) -> None:
    assert parse_key(key) is None
    assert decode(key, b"{}") is None


def test_a_value_is_compact_and_does_not_repeat_its_key() -> None:
    record = ModelRecord("m", "onnx", path="s3://b/m")
    assert orjson.loads(encode(record)) == {
        "version": 1,
        "model_type": "onnx",
        "path": "s3://b/m",
    }


def test_what_a_newer_version_wrote_is_written_back() -> None:
    stored = b'{"version":2,"state":"LOADED","size_bytes":7,"tier":"gpu","more":{"a":[1]}}'
    record = decode("copies/m/i", stored)
    assert isinstance(record, CopyRecord)
    assert record.extra == {"tier": "gpu", "more": {"a": [1]}}
    rewritten = orjson.loads(encode(dataclasses.replace(record, size_bytes=8)))
    assert rewritten == {**orjson.loads(stored), "size_bytes": 8}


def test_extra_never_hides_a_field() -> None:
    record = CopyRecord("m", "i", CopyState.LOADED, extra={"state": "LOADING", "model_id": "x"})
    assert orjson.loads(encode(record)) == {"version": 1, "state": "LOADED"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("models/m", b"\xff", "models/m: the value is not JSON"),
        ("models/m", b"", "models/m: the value is not JSON"),
        ("models/m", b"[1]", "not a JSON object"),
        ("models/m", b"{}", "models/m: the record lacks model_type"),
        ("models/m", b'{"model_type":1}', "field 'model_type' is 1: expected text"),
        ("models/m", b'{"model_type":"a","min_copies":true}', "'min_copies' is True"),
        ("models/m", b'{"model_type":"a","pinned":1}', "expected true or false"),
        ("models/m", b'{"model_type":"a","labels":{"a":1}}', "expected an object of texts"),
        ("models/m", b'{"model_type":"a","max_concurrency":"3"}', "expected a whole number"),
        ("vmodels/v", b'{"active_model_id":"a"}', "lacks target_model_id"),
        ("instances/i", b'{"address":"a","state":"GONE","capacity_bytes":1}', "'state' is 'GONE'"),
        (
            "instances/i",
            b'{"address":"a","state":"READY","capacity_bytes":1,"model_types":"onnx"}',
            "expected a list of texts",
        ),
        ("copies/m/i", b'{"state":[]}', "copies/m/i: field 'state'"),
        (
            "failures/m/i",
            b'{"code":"OOPS","message":"","failed_at_ms":1,"expires_at_ms":1}',
            "'OOPS' is no code",
        ),
    ],
)
def test_a_bad_value_is_named(key: str, value: bytes, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        decode(key, value)
    assert message in caught.value.message


@pytest.mark.parametrize("name", ["", "a" * (MAX_NAME_CHARS + 1), "\ud800"])
def test_a_name_that_cannot_be_a_key_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        model_key(name)


ids = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)


@given(
    st.dictionaries(ids, integers, max_size=5),
    st.dictionaries(ids, st.floats(0.0, 1e6), max_size=5),
)
def test_last_uses_and_use_scores_survive(
    last_used_at_ms: dict[str, int], scores: dict[str, float]
) -> None:
    assert decode_uses("i", encode_last_used(last_used_at_ms)) == Uses(last_used_at_ms, {})
    value = encode_last_used(last_used_at_ms, scores)
    uses = decode_uses("i", value)
    assert uses.last_used_at_ms == last_used_at_ms
    assert uses.scores == pytest.approx(scores, abs=0.001)


def test_the_version_before_reads_a_blob_with_use_scores_and_takes_them_for_unknown_models() -> (
    None
):
    value = encode_last_used({"m": 1_700_000_000_000}, {"m": 472_222.5})
    seen_before = json.loads(value)  # all that it did: whole numbers, by a model's id
    assert all(type(told) is int for told in seen_before.values())
    assert seen_before.pop("m") == max(json.loads(value).values()) == 1_700_000_000_000
    (unknown,) = seen_before
    with pytest.raises(InvalidArgument):
        check_model_id(unknown)  # no registered model is meant by accident


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        pytest.param("policy", b"[]", "not a JSON object", id="a policy is an object"),
        pytest.param(
            "type_constraints", b'{"onnx": []}', "type_constraints.onnx: expected an object",
            id="constraints of a type are an object",
        ),
        pytest.param(
            "type_constraints", b'{"onnx": {"require": []}}', "unknown field 'require'",
            id="a misspelt part is named",
        ),
        pytest.param(
            "type_constraints", b'{"onnx": {"required": "gpu"}}', "onnx.required: expected a list",
            id="labels are a list",
        ),
    ],
)  # fmt: skip
def test_a_bad_live_setting_is_named(name: str, value: bytes, problem: str) -> None:
    with pytest.raises(RecordError, match=f"config/{name}") as caught:
        decode_config(name, value)
    assert problem in caught.value.message


def test_live_settings_survive_also_those_of_a_newer_version() -> None:
    for name in ("policy", "type_constraints", "from_the_future"):
        settings = {"onnx": {"required": ["gpu"], "preferred": []}}
        assert decode_config(name, encode_config(settings)) == settings
        assert parse_key(config_key(name)) == Key(Family.CONFIG, name)


@pytest.mark.parametrize("value", [b"", b"[]", b'{"m":"x"}', b'{"m":null}'])
def test_bad_last_uses_are_named(value: bytes) -> None:
    with pytest.raises(RecordError, match="lastused/i"):
        decode_uses("i", value)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, -1.0, 1e300])
def test_a_score_that_cannot_be_is_left_out_of_the_blob(score: float) -> None:
    blob = encode_last_used({"m": 5}, {"m": score, "n": 2.5})
    told = decode_uses("i", blob)
    assert (told.last_used_at_ms, told.scores) == ({"m": 5}, {"n": 2.5})


def test_a_negative_size_is_no_record() -> None:
    value = b'{"version":1,"model_type":"onnx","size_bytes_stated":-1000000}'
    with pytest.raises(RecordError, match="size_bytes_stated"):
        decode("models/m", value)
