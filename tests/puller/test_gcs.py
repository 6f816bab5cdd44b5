"""Google Cloud Storage: against a server that checks the signature of each token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from mesh.core.errors import Code, LoadFailed
from tests.puller.cloud_servers import GoogleServer, private_key_pem
from tests.puller.conftest import OpenPuller, entries, leftovers, request
from tests.puller.fakes import content

EMAIL = "reader@test.iam.gserviceaccount.com"
KEY = '{"storage_key": "google"}'
OBJECTS = {"m/model.onnx": content(35_000), "m/sub dir/labels": b"abc", "mm": b"another"}


@pytest.fixture(scope="module")
def account() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65_537, key_size=2048)


def storage(directory: Path, endpoint: str, key: rsa.RSAPrivateKey, **changes: str) -> Path:
    entry = {
        "type": "gcs",
        "bucket": "bucket-1",
        "client_email": EMAIL,
        "private_key": private_key_pem(key),
        "token_uri": "https://oauth2.googleapis.com/token",
        "endpoint_url": endpoint,
        **changes,
    }
    directory.mkdir(exist_ok=True)
    (directory / "google").write_text(json.dumps(entry))
    return directory


async def test_a_service_account_pulls_a_folder(
    open_puller: OpenPuller, tmp_path: Path, account: rsa.RSAPrivateKey
) -> None:
    server = GoogleServer("bucket-1", OBJECTS, key=account.public_key(), email=EMAIL)
    async with server.serving() as endpoint:
        puller = open_puller(storage_config_dir=storage(tmp_path / "s", endpoint, account))
        artifact = await puller.fetch(request("gs://bucket-1/m", KEY))
        assert artifact.source == "gs://bucket-1/m"
        assert (artifact.path / "model.onnx").read_bytes() == OBJECTS["m/model.onnx"]
        assert (artifact.path / "sub dir/labels").read_bytes() == b"abc"
        assert (await puller.fetch(request("m", KEY))).cached  # by the key's own bucket
    assert server.denied == []


async def test_a_changed_object_is_noticed(
    open_puller: OpenPuller, tmp_path: Path, account: rsa.RSAPrivateKey
) -> None:
    server = GoogleServer("bucket-1", {"m": b"old"}, key=account.public_key(), email=EMAIL)
    async with server.serving() as endpoint:
        puller = open_puller(storage_config_dir=storage(tmp_path / "s", endpoint, account))
        await puller.fetch(request("m", KEY))
        server.objects = {"m": b"new"}
        assert (await puller.fetch(request("m", KEY))).path.read_bytes() == b"new"


async def test_the_key_of_another_account_is_refused_and_not_shown(
    open_puller: OpenPuller,
    tmp_path: Path,
    account: rsa.RSAPrivateKey,
    cache_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    other = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    server = GoogleServer("bucket-1", OBJECTS, key=account.public_key(), email=EMAIL)
    async with server.serving() as endpoint:
        puller = open_puller(storage_config_dir=storage(tmp_path / "s", endpoint, other))
        with pytest.raises(LoadFailed, match="refused access with storage key 'google'") as caught:
            await puller.fetch(request("m", KEY))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert server.denied
    told = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
    assert "PRIVATE KEY" not in told
    assert private_key_pem(other).splitlines()[1] not in told
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_a_key_that_is_none_is_told(open_puller: OpenPuller, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    entry = {"type": "gcs", "bucket": "bucket-1", "client_email": EMAIL, "private_key": "SECRET"}
    (folder / "google").write_text(json.dumps(entry))
    with pytest.raises(LoadFailed, match="the settings of storage key 'google' do not") as caught:
        await open_puller(storage_config_dir=folder).fetch(request("m", KEY))
    assert "SECRET" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize(
    "token_uri",
    [
        "http://oauth2.googleapis.com/token",
        "https://oauth2.googleapis.com.evil.test/token",
        "https://oauth2.googleapis.com@evil.test/token",
        "http://169.254.169.254/latest",
        "https://evil.test/?https://oauth2.googleapis.com/token",
    ],
)
async def test_tokens_of_another_address_are_refused_and_nobody_is_asked(
    open_puller: OpenPuller, tmp_path: Path, account: rsa.RSAPrivateKey, token_uri: str
) -> None:
    server = GoogleServer("bucket-1", OBJECTS, key=account.public_key(), email=EMAIL)
    async with server.serving() as endpoint:
        config = storage(tmp_path / "secret", endpoint, account, token_uri=token_uri)
        with pytest.raises(LoadFailed, match="token_uri of storage key 'google'") as caught:
            await open_puller(storage_config_dir=config).fetch(request("gs://bucket-1/m", KEY))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert server.requests == 0


async def test_a_public_bucket_needs_no_key(open_puller: OpenPuller) -> None:
    async with GoogleServer("bucket-1", OBJECTS).serving() as endpoint:
        puller = open_puller(store_env={"STORAGE_EMULATOR_HOST": endpoint})
        artifact = await puller.fetch(request("gs://bucket-1/mm"))
        assert artifact.path.read_bytes() == b"another"
        with pytest.raises(LoadFailed, match="there is no bucket 'bucket-2'"):
            await puller.fetch(request("gs://bucket-2/mm"))
        with pytest.raises(LoadFailed, match="gs://bucket-1/nope does not exist"):
            await puller.fetch(request("gs://bucket-1/nope"))


async def test_a_bucket_that_disappears_half_way_leaves_nothing_published(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    server = GoogleServer("bucket-1", {"m": content(100_000)}, gone_after=5)
    async with server.serving() as endpoint:
        puller = open_puller(store_env={"STORAGE_EMULATOR_HOST": endpoint})
        with pytest.raises(LoadFailed, match="there is no bucket 'bucket-1'") as caught:
            await puller.fetch(request("gs://bucket-1/m"))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert leftovers(cache_dir) == entries(cache_dir) == []
