"""(path, key) → location, as a table; nothing here touches disk or network."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mesh.core.errors import Code, LoadFailed
from puller.location import FileLocation, Location, PvcLocation, S3Location
from puller.resolve import resolve_location
from puller.storage_key import StorageSecret

ENTRY = {
    "type": "s3",
    "access_key_id": "ID-OF-ENTRY",
    "secret_access_key": "SECRET-OF-ENTRY",
    "endpoint_url": "http://minio:9000/",
    "region": "eu-central-1",
    "bucket": "entry-bucket",
    "certificate": "-----BEGIN CERTIFICATE-----",
}
AWS = {"AWS_ACCESS_KEY_ID": "ID-OF-ENV", "AWS_SECRET_ACCESS_KEY": "SECRET-OF-ENV"}


def resolve(
    path: str, key: Any = "", entries: dict[str, Any] | None = None, **store_env: str
) -> Location:
    texts = {
        name: entry if isinstance(entry, str) else json.dumps(entry)
        for name, entry in (entries or {}).items()
    }
    return resolve_location(
        path,
        key if isinstance(key, str) else json.dumps(key),
        secret=StorageSecret("/storage-config", texts),
        store_env=store_env,
    )


def resolve_s3(path: str, key: Any = "", entries: Any = None, **store_env: str) -> S3Location:
    location = resolve(path, key, entries, **store_env)
    assert isinstance(location, S3Location)
    return location


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("file:///srv/models/a", FileLocation("/srv/models/a")),
        ("FILE:///srv/a", FileLocation("/srv/a")),
        ("file://localhost/srv/a/", FileLocation("/srv/a")),
        ("file:///srv/my%20model", FileLocation("/srv/my model")),
        ("pvc://claim-1/a/b", PvcLocation("claim-1", "a/b")),
        ("pvc://claim-1", PvcLocation("claim-1", "")),
        ("pvc://claim-1//etc/passwd", PvcLocation("claim-1", "etc/passwd")),
    ],
)
def test_local_uris(path: str, expected: Location) -> None:
    assert resolve(path) == expected


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("file:///srv/../etc/passwd", "'..'"),
        ("file:///srv/%2e%2e/etc/passwd", "'..'"),
        ("file:///srv/a%00b", "control"),
        ("file://srv/models", "three slashes"),
        ("pvc://../x", "volume claim"),
        ("pvc://a..b/x", "volume claim"),
        ("pvc:///x", "volume claim is missing"),
        ("pvc://claim/../../x", "'..'"),
        ("s3://bucket/a/../b", "'..'"),
        ("s3:///a", "no bucket|not the name"),
        ("s3://bad bucket/a", "not the name of a bucket"),
        ("gs://b/../x", "not the name of a bucket"),
        ("hf://org/model", "hf:// is not supported: copy the repository into a bucket"),
        ("oci://h/x", "oci:// is not supported: copy the model out of the image"),
        ("hdfs://h/x", "hdfs:// is not supported: .* mount it as a volume"),
        ("webhdfs://h/x", "webhdfs:// is not supported: copy it into a bucket"),
        ("bogus://x", "bogus:// is not supported: .* can be at file://, pvc://, s3://, gs://"),
        ("models/a", "not a URI"),
        ("", "not a URI"),
    ],
)
def test_paths_that_are_refused(path: str, says: str) -> None:
    with pytest.raises(LoadFailed, match=says) as caught:
        resolve(path)
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_s3_uri_with_the_store_environment() -> None:
    location = resolve_s3(
        "s3://b1/models/a/",
        AWS_SESSION_TOKEN="TOKEN",
        AWS_DEFAULT_REGION="eu-west-1",
        AWS_ENDPOINT_URL="http://generic:1",
        AWS_ENDPOINT_URL_S3="http://special:2",
        AWS_CA_BUNDLE="/ca.pem",
        **AWS,
    )
    assert (location.bucket, location.prefix) == ("b1", "models/a")
    assert (location.endpoint, location.region) == ("http://special:2", "eu-west-1")
    assert location.credentials.access_key_id == "ID-OF-ENV"
    assert location.credentials.session_token == "TOKEN"
    assert location.certificate_file == "/ca.pem"
    assert location.uri == "s3://b1/models/a"


def test_s3_without_any_credentials_is_anonymous() -> None:
    location = resolve_s3("s3://b1/a")
    assert location.credentials.anonymous
    assert "anonymous" in location.credentials_from
    assert location.region == "us-east-1"


def test_half_a_pair_of_keys_is_an_error() -> None:
    with pytest.raises(LoadFailed, match="only one of AWS_ACCESS_KEY_ID"):
        resolve("s3://b1/a", AWS_ACCESS_KEY_ID="x")
    with pytest.raises(LoadFailed, match="'k' has only one of"):
        resolve(
            "a", {"storage_key": "k"}, {"k": {"type": "s3", "bucket": "bb", "access_key_id": "x"}}
        )


def test_a_storage_key_gives_everything() -> None:
    location = resolve_s3("/models/a", {"storage_key": "k"}, {"k": ENTRY}, **AWS)
    assert location == S3Location(
        bucket="entry-bucket",
        prefix="models/a",
        endpoint="http://minio:9000",
        region="eu-central-1",
        credentials=location.credentials,
        credentials_from="storage key 'k'",
        certificate_pem="-----BEGIN CERTIFICATE-----",
    )
    assert location.credentials.secret_access_key == "SECRET-OF-ENTRY"


@pytest.mark.parametrize(
    ("key", "entries", "chosen"),
    [
        ({}, {"default": ENTRY, "default_s3": {**ENTRY, "bucket": "by-type"}}, "default"),
        (
            {"storage_params": {"type": "s3"}},
            {"default": {"type": "pvc", "name": "x"}, "default_s3": ENTRY},
            "default_s3",
        ),
        ({"storage_params": {"type": "s3"}}, {"default": ENTRY}, "default"),
        ({"storage_key": "other"}, {"default": ENTRY, "other": ENTRY}, "other"),
        ({"storage_key": ""}, {"default": ENTRY}, "default"),
    ],
)
def test_which_entry_is_chosen(key: Any, entries: dict[str, Any], chosen: str) -> None:
    assert resolve_s3("a", key, entries).credentials_from == f"storage key {chosen!r}"


def test_an_s3_uri_takes_its_bucket_and_the_default_entrys_credentials() -> None:
    location = resolve_s3("s3://mine/a", "", {"default_s3": ENTRY}, **AWS)
    assert location.bucket == "mine"
    assert location.credentials_from == "storage key 'default_s3'"


def test_an_s3_uri_passes_over_a_default_of_another_type() -> None:
    entries = {"default": {"type": "pvc", "name": "claim"}}
    assert resolve_s3("s3://b1/a", "", entries, **AWS).credentials_from == "the AWS environment"


def test_an_s3_uri_with_a_key_of_another_type_is_an_error() -> None:
    with pytest.raises(LoadFailed, match="'k' is of type 'pvc'"):
        resolve("s3://b1/a", {"storage_key": "k"}, {"k": {"type": "pvc", "name": "claim"}})


@pytest.mark.parametrize(
    ("params", "bucket", "region"),
    [
        ({"bucket": "override"}, "override", "eu-central-1"),
        ({"default_bucket": "override"}, "override", "eu-central-1"),
        ({"region": "us-west-2"}, "entry-bucket", "us-west-2"),
        ({"bucket": ""}, "entry-bucket", "eu-central-1"),
    ],
)
def test_parameters_override_the_entry(params: dict[str, str], bucket: str, region: str) -> None:
    location = resolve_s3("a", {"storage_key": "k", "storage_params": params}, {"k": ENTRY})
    assert (location.bucket, location.region) == (bucket, region)


def test_the_old_bucket_field_and_the_old_default_bucket() -> None:
    assert resolve_s3("a", {"storage_key": "k", "bucket": "old"}, {"k": ENTRY}).bucket == "old"
    entry = {"type": "s3", "default_bucket": "legacy"}
    assert resolve_s3("a", {"storage_key": "k"}, {"k": entry}).bucket == "legacy"


def test_a_claim_by_storage_key() -> None:
    entries = {"k": {"type": "pvc", "name": "claim-1"}}
    assert resolve("dir/a", {"storage_key": "k"}, entries) == PvcLocation("claim-1", "dir/a")
    key = {"storage_params": {"type": "pvc", "name": "claim-2"}}
    assert resolve("a", key) == PvcLocation("claim-2", "a")


@pytest.mark.parametrize(
    ("key", "entries", "says"),
    [
        ("not json", {}, "key is not a JSON object"),
        ("[1]", {}, "key is not a JSON object"),
        ({"storage_key": 1}, {}, "storage_key"),
        ({"storage_params": {"bucket": 1}}, {}, "storage_params"),
        (
            {"storage_key": "nope"},
            {"aaa": ENTRY, "bbb": ENTRY},
            "specified storage key 'nope' not found in storage secret '/storage-config' "
            r"\(its keys: aaa, bbb\)",
        ),
        ({"storage_key": "nope"}, {}, "it has no entries"),
        ({"storage_key": "k"}, {"k": "{broken"}, "entry 'k' .* is not a JSON object"),
        ({"storage_key": "k"}, {"k": {"bucket": "b1"}}, "'k' has no 'type'"),
        ({"storage_key": "k"}, {"k": {"type": "hdfs"}}, "'hdfs' .* is not supported: copy it"),
        ({"storage_key": "k"}, {"k": {"type": "ftp"}}, "'ftp' .* supported are s3, gcs, azure"),
        ({"storage_key": "k"}, {"k": {"type": "s3"}}, "no bucket"),
        ({"storage_key": "k"}, {"k": {**ENTRY, "region": 5}}, "'region' of storage key 'k'"),
        ({"storage_key": "k"}, {"k": {**ENTRY, "endpoint_url": "minio:9000"}}, "http://"),
        ({"storage_key": "k"}, {"k": {**ENTRY, "endpoint_url": "http://a:b@h"}}, "user name"),
        (
            {"storage_key": "k", "storage_params": {"endpoint_url": "http://evil"}},
            {"k": ENTRY},
            "'endpoint_url' cannot be set by a model",
        ),
        (
            {"storage_key": "k", "storage_params": {"buket": "x"}},
            {"k": ENTRY},
            "'buket' cannot be set by a model",
        ),
    ],
)
def test_bad_keys(key: Any, entries: dict[str, Any], says: str) -> None:
    with pytest.raises(LoadFailed, match=says) as caught:
        resolve("models/a", key, entries)
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_no_secret_shows_in_a_repr_or_a_message() -> None:
    location = resolve_s3("a", {"storage_key": "k"}, {"k": ENTRY}, **AWS)
    secret = StorageSecret("/storage-config", {"k": "SECRET-OF-ENTRY"})
    assert "SECRET-OF" not in repr(location) + repr(secret)
    assert "ID-OF" not in repr(location)
    with pytest.raises(LoadFailed) as caught:
        resolve("a", {"storage_key": "k"}, {"k": '{"secret_access_key": "SECRET-OF-ENTRY'})
    assert "SECRET-OF" not in str(caught.value) + repr(caught.value.__cause__)


def test_the_same_place_by_another_key_is_another_artifact() -> None:
    entries = {"a": ENTRY, "b": ENTRY}
    by_a = resolve_s3("m", {"storage_key": "a"}, entries)
    by_b = resolve_s3("m", {"storage_key": "b"}, entries)
    assert by_a.identity != by_b.identity
    assert by_a.identity == resolve_s3("m/", {"storage_key": "a"}, entries).identity
