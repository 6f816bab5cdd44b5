"""The S3 back end against a server with S3's semantics, and against servers that misbehave."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mesh.core.errors import Code, LoadFailed
from puller.puller import Puller
from tests.puller.conftest import AWS_KEYS, OpenPuller, entries, leftovers, request
from tests.puller.fakes import content
from tests.puller.servers import Relay, answering, relaying, self_signed

Env = dict[str, str]


async def failure(puller: Puller, path: str, key: str = "") -> LoadFailed:
    with pytest.raises(LoadFailed) as caught:
        await puller.fetch(request(path, key))
    return caught.value


def env(endpoint: str) -> Env:
    return {**AWS_KEYS, "AWS_ENDPOINT_URL": endpoint}


async def test_a_folder_with_odd_names(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_env: Env
) -> None:
    objects = {
        "big.bin": content(95_000),
        "sub/deep/a b+ü%20?#&='.onnx": b"odd",
        "empty": b"",
        "~tilde!(1)*": b"more",
    }
    for name, data in objects.items():
        s3.put_object(Bucket=bucket, Key=f"models/m 1/{name}", Body=data)
    s3.put_object(Bucket=bucket, Key="models/m 1/", Body=b"")  # markers, as consoles make them
    s3.put_object(Bucket=bucket, Key="models/m 1/sub/", Body=b"")
    s3.put_object(Bucket=bucket, Key="models/m 10/other", Body=b"not mine")
    artifact = await open_puller(store_env=moto_env).fetch(request(f"s3://{bucket}/models/m 1"))
    found = {
        str(path.relative_to(artifact.path)): path.read_bytes()
        for path in artifact.path.rglob("*")
        if path.is_file()
    }
    assert found == objects


async def test_a_single_object(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_env: Env
) -> None:
    s3.put_object(Bucket=bucket, Key="a/model.onnx", Body=content(25_000))
    puller = open_puller(store_env=moto_env)
    artifact = await puller.fetch(request(f"s3://{bucket}/a/model.onnx"))
    assert artifact.path.name == "model.onnx"
    assert artifact.path.read_bytes() == content(25_000)
    assert not artifact.cached
    assert (await puller.fetch(request(f"s3://{bucket}/a/model.onnx"))).cached


async def test_a_whole_bucket(open_puller: OpenPuller, s3: Any, bucket: str, moto_env: Env) -> None:
    s3.put_object(Bucket=bucket, Key="x/y", Body=b"1")
    artifact = await open_puller(store_env=moto_env).fetch(request(f"s3://{bucket}"))
    assert (artifact.path / "x/y").read_bytes() == b"1"


async def test_a_multipart_object_whose_etag_is_no_md5(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_env: Env
) -> None:
    parts = [content(5 << 20, seed=1), content(1_000, seed=2)]
    upload = s3.create_multipart_upload(Bucket=bucket, Key="m")["UploadId"]
    etags = [
        s3.upload_part(Bucket=bucket, Key="m", UploadId=upload, PartNumber=n, Body=part)["ETag"]
        for n, part in enumerate(parts, start=1)
    ]
    s3.complete_multipart_upload(
        Bucket=bucket,
        Key="m",
        UploadId=upload,
        MultipartUpload={
            "Parts": [{"ETag": etag, "PartNumber": n} for n, etag in enumerate(etags, start=1)]
        },
    )
    puller = open_puller(
        store_env=moto_env, part_bytes=1 << 20, chunk_bytes=1 << 18, cache_capacity_bytes=1 << 25
    )
    artifact = await puller.fetch(request(f"s3://{bucket}/m"))
    assert artifact.path.read_bytes() == b"".join(parts)


async def test_more_objects_than_one_page_lists(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_env: Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    for i in range(35):
        s3.put_object(Bucket=bucket, Key=f"m/{i:04}", Body=b"x")
    assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 10
    few = open_puller(store_env=moto_env, max_artifact_files=34)
    refused = await failure(few, f"s3://{bucket}/m")
    assert "more than 34 objects" in refused.message
    artifact = await open_puller(store_env=moto_env).fetch(request(f"s3://{bucket}/m"))
    assert artifact.size_bytes == len(list(artifact.path.iterdir())) == 35


async def test_through_a_storage_key(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_endpoint: str, tmp_path: Path
) -> None:
    s3.put_object(Bucket=bucket, Key="dir/m", Body=b"model")
    entry = {
        "type": "s3",
        "access_key_id": "k",
        "secret_access_key": "s",
        "endpoint_url": moto_endpoint,
        "bucket": "something-else",
    }
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/local").write_text(json.dumps(entry))
    puller = open_puller(storage_config_dir=tmp_path / "secret", store_env={})
    key = json.dumps({"storage_key": "local", "storage_params": {"bucket": bucket}})
    artifact = await puller.fetch(request("dir/m", key))
    assert artifact.path.read_bytes() == b"model"


async def test_this_process_environment_has_no_say(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_env: Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_ENDPOINT": "http://127.0.0.1:1",
        "AWS_REGION": "xx-nowhere-1",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_BUCKET": "other",
    }.items():
        monkeypatch.setenv(name, value)
    s3.put_object(Bucket=bucket, Key="m", Body=b"model")
    artifact = await open_puller(store_env=moto_env).fetch(request(f"s3://{bucket}/m"))
    assert artifact.path.read_bytes() == b"model"


async def test_missing_things_are_final_and_named(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_env: Env, cache_dir: Path
) -> None:
    puller = open_puller(store_env=moto_env)
    s3.put_object(Bucket=bucket, Key="only-a-marker/", Body=b"")
    for path, says in (
        (f"s3://{bucket}/nope", "does not exist"),
        (f"s3://{bucket}/only-a-marker", "does not exist"),
        ("s3://no-such-bucket/m", "there is no bucket 'no-such-bucket'"),
    ):
        error = await failure(puller, path)
        assert error.code is Code.FAILED_PRECONDITION
        assert path in error.message
        assert says in error.message
    assert leftovers(cache_dir) == entries(cache_dir) == []


@pytest.mark.parametrize("name", ["a/../../evil", "/abs", "a//b", "a\\b", "./a", "a\x01b"])
async def test_object_names_that_would_escape_are_refused(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_env: Env, cache_dir: Path, name: str
) -> None:
    s3.put_object(Bucket=bucket, Key=f"m/{name}", Body=b"evil")
    s3.put_object(Bucket=bucket, Key="m/good", Body=b"good")
    error = await failure(open_puller(store_env=moto_env), f"s3://{bucket}/m")
    assert error.code is Code.FAILED_PRECONDITION
    assert "unsafe" in error.message
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_dropped_connections_are_resumed(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_endpoint: str
) -> None:
    data = content(200_000)
    s3.put_object(Bucket=bucket, Key="m", Body=data)
    relay = Relay(moto_endpoint, cut_after_bytes=12_000, cuts=6)
    async with relaying(relay) as endpoint:
        puller = open_puller(store_env=env(endpoint), part_bytes=50_000, attempts_max=8)
        artifact = await puller.fetch(request(f"s3://{bucket}/m"))
    assert artifact.path.read_bytes() == data
    assert relay.cuts_left == 0


async def test_a_changed_object_is_noticed_by_its_etag(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_endpoint: str
) -> None:
    """The object changes after the first connection broke: no mixture of both may arrive."""
    old, new = content(60_000, seed=1), content(60_000, seed=2)
    s3.put_object(Bucket=bucket, Key="m", Body=old)

    class Changing(Relay):
        async def serve(self, reader: Any, writer: Any) -> None:
            await super().serve(reader, writer)
            if self.cuts_left == 0:
                s3.put_object(Bucket=bucket, Key="m", Body=new)

    relay = Changing(moto_endpoint, cut_after_bytes=20_000, cuts=1)
    async with relaying(relay) as endpoint:
        puller = open_puller(
            store_env=env(endpoint), part_bytes=60_000, parallelism=1, backoff_base_ms=50
        )
        artifact = await puller.fetch(request(f"s3://{bucket}/m"))
    assert artifact.path.read_bytes() == new


async def test_a_bucket_that_disappears_half_way_and_comes_back(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_env: Env, cache_dir: Path
) -> None:
    data = content(100_000)
    s3.put_object(Bucket=bucket, Key="m", Body=data)

    def progress(done_bytes: int, _: int | None) -> None:
        if done_bytes == 50_000:
            s3.delete_object(Bucket=bucket, Key="m")
            s3.delete_bucket(Bucket=bucket)

    puller = open_puller(store_env=moto_env, parallelism=1)
    with pytest.raises(LoadFailed, match=f"there is no bucket '{bucket}'") as caught:
        await puller.fetch(request(f"s3://{bucket}/m"), progress)
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert leftovers(cache_dir) == entries(cache_dir) == []
    s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket=bucket, Key="m", Body=data)
    artifact = await puller.fetch(request(f"s3://{bucket}/m"))
    assert artifact.path.read_bytes() == data


async def test_every_read_names_its_version(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_endpoint: str
) -> None:
    """So that a changed object costs a refusal and not a transfer."""
    etag = s3.put_object(Bucket=bucket, Key="m", Body=content(40_000))["ETag"]
    relay = Relay(moto_endpoint)
    async with relaying(relay) as endpoint:
        await open_puller(store_env=env(endpoint)).fetch(request(f"s3://{bucket}/m"))
    sent = relay.requests.decode().lower()
    assert sent.count("range: bytes=") == 4
    assert sent.count(f"if-match: {etag}") == 4


async def test_an_unreachable_store_is_unavailable(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        error = await failure(open_puller(store_env=env(endpoint)), "s3://bucket/m")
    assert error.code is Code.UNAVAILABLE
    assert endpoint in error.message
    assert "no connection" in error.message
    assert leftovers(cache_dir) == []


async def test_a_store_that_never_answers_is_unavailable(open_puller: OpenPuller) -> None:
    async with answering("", silent=True) as endpoint:
        puller = open_puller(store_env=env(endpoint), read_timeout_ms=50, attempts_max=2)
        error = await failure(puller, "s3://bucket/m")
    assert error.code is Code.UNAVAILABLE
    assert "time-out" in error.message


@pytest.mark.parametrize(
    ("status", "s3_code", "code", "says"),
    [
        ("503 Slow Down", "SlowDown", Code.UNAVAILABLE, "answered 503 SlowDown"),
        ("500 Oops", "InternalError", Code.UNAVAILABLE, "answered 500"),
        ("429 Too Many", "", Code.UNAVAILABLE, "answered 429"),
        ("403 Forbidden", "AccessDenied", Code.FAILED_PRECONDITION, "refused access with the AWS"),
        ("401 Who", "", Code.FAILED_PRECONDITION, "refused access"),
        ("400 Bad", "ExpiredToken", Code.FAILED_PRECONDITION, "refused access"),
        ("400 Bad", "AuthorizationHeaderMalformed", Code.FAILED_PRECONDITION, "not in region"),
        ("301 Moved", "PermanentRedirect", Code.FAILED_PRECONDITION, "not in region"),
        ("403 Forbidden", "RequestTimeTooSkewed", Code.FAILED_PRECONDITION, "clock"),
        ("418 Teapot", "Teapot", Code.FAILED_PRECONDITION, "refused the request (418 Teapot)"),
    ],
)
async def test_what_a_store_may_answer(
    open_puller: OpenPuller, status: str, s3_code: str, code: Code, says: str
) -> None:
    async with answering(status, f"<Error><Code>{s3_code}</Code></Error>") as endpoint:
        puller = open_puller(store_env=env(endpoint), attempts_max=2)
        error = await failure(puller, "s3://bucket/m")
    assert error.code is code
    assert says in error.message
    assert "s3://bucket/m" in error.message
    assert "test-secret" not in error.message


async def test_anonymous_and_refused_says_what_to_do(open_puller: OpenPuller) -> None:
    async with answering("403 Forbidden") as endpoint:
        puller = open_puller(store_env={"AWS_ENDPOINT_URL": endpoint})
        error = await failure(puller, "s3://bucket/m")
    assert "no credentials were given" in error.message


async def test_tls_with_a_certificate_of_ones_own(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_endpoint: str, tmp_path: Path
) -> None:
    s3.put_object(Bucket=bucket, Key="m", Body=b"model")
    context, pem = self_signed(tmp_path)
    (tmp_path / "ca.pem").write_text(pem)
    (tmp_path / "secret").mkdir()
    async with relaying(Relay(moto_endpoint), context) as endpoint:
        distrusting = open_puller(store_env=env(endpoint))
        error = await failure(distrusting, f"s3://{bucket}/m")
        assert error.code is Code.FAILED_PRECONDITION
        assert "certificate" in error.message
        by_bundle = open_puller(
            store_env={**env(endpoint), "AWS_CA_BUNDLE": str(tmp_path / "ca.pem")}
        )
        artifact = await by_bundle.fetch(request(f"s3://{bucket}/m"))
        assert artifact.path.read_bytes() == b"model"
        entry = {"type": "s3", "endpoint_url": endpoint, "bucket": bucket, "certificate": pem}
        (tmp_path / "secret/k").write_text(
            json.dumps({**entry, "access_key_id": "k", "secret_access_key": "s"})
        )
        by_key = open_puller(storage_config_dir=tmp_path / "secret", store_env={})
        assert not (await by_key.fetch(request("m", '{"storage_key": "k"}'))).cached
    missing = open_puller(store_env={**env(endpoint), "AWS_CA_BUNDLE": "/nope.pem"})
    assert "'/nope.pem' cannot be read" in (await failure(missing, f"s3://{bucket}/m")).message
