"""Azure Blob Storage: against a server that checks the signature of each request."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from mesh.core.errors import Code, LoadFailed
from tests.puller.cloud_servers import AzureServer
from tests.puller.conftest import OpenPuller, entries, leftovers, request
from tests.puller.fakes import content

SECRET = base64.b64encode(b"the-right-secret-of-the-account").decode()
WRONG = base64.b64encode(b"a-wrong-secret-of-somebody-else").decode()
KEY = '{"storage_key": "blobs"}'
OBJECTS = {"m/model.onnx": content(35_000), "m/sub/labels": b"abc"}


def server(**changes: object) -> AzureServer:
    options: dict[str, object] = {"account_key": base64.b64decode(SECRET), **changes}
    return AzureServer("models", dict(OBJECTS), **options)  # type: ignore[arg-type]


def storage(directory: Path, endpoint: str, secret: str = SECRET) -> Path:
    directory.mkdir(exist_ok=True)
    connection = f"AccountName=testaccount;AccountKey={secret};BlobEndpoint={endpoint}/testaccount"
    entry = {"type": "azure", "container": "models", "connection_string": connection}
    (directory / "blobs").write_text(json.dumps(entry))
    return directory


async def test_a_connection_string_pulls_a_folder(open_puller: OpenPuller, tmp_path: Path) -> None:
    blobs = server()
    async with blobs.serving() as endpoint:
        puller = open_puller(storage_config_dir=storage(tmp_path / "s", endpoint))
        artifact = await puller.fetch(request("azure://models/m", KEY))
        assert (artifact.path / "model.onnx").read_bytes() == OBJECTS["m/model.onnx"]
        assert (artifact.path / "sub/labels").read_bytes() == b"abc"
        assert artifact.source == "azure://models/m"
        for same in ("m", "https://testaccount.blob.core.windows.net/models/m"):
            assert (await puller.fetch(request(same, KEY))).cached
    assert blobs.denied == []


async def test_a_changed_blob_is_noticed(open_puller: OpenPuller, tmp_path: Path) -> None:
    blobs = server()
    async with blobs.serving() as endpoint:
        puller = open_puller(storage_config_dir=storage(tmp_path / "s", endpoint))
        await puller.fetch(request("m/sub/labels", KEY))
        blobs.objects["m/sub/labels"] = b"xyz"
        artifact = await puller.fetch(request("m/sub/labels", KEY))
        assert artifact.path.read_bytes() == b"xyz"


async def test_a_wrong_secret_is_refused_and_not_shown(
    open_puller: OpenPuller, tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with server().serving() as endpoint:
        puller = open_puller(storage_config_dir=storage(tmp_path / "s", endpoint, WRONG))
        with pytest.raises(LoadFailed, match="refused access with storage key 'blobs'") as caught:
            await puller.fetch(request("m", KEY))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert WRONG not in f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_the_environment_gives_account_and_key(open_puller: OpenPuller) -> None:
    async with server().serving() as endpoint:
        environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": "testaccount",
            "AZURE_STORAGE_ACCESS_KEY": SECRET,
            "AZURE_STORAGE_ENDPOINT": f"{endpoint}/testaccount",
        }
        puller = open_puller(store_env=environment)
        artifact = await puller.fetch(request("abfs://models@testaccount.dfs.core.windows.net/m"))
        assert (artifact.path / "sub/labels").read_bytes() == b"abc"
        with pytest.raises(LoadFailed, match="there is no bucket 'other'"):
            await puller.fetch(request("azure://other/m"))


async def test_a_shared_access_signature_is_enough(open_puller: OpenPuller, tmp_path: Path) -> None:
    async with server(account_key=b"", sas="signed-by-them").serving() as endpoint:
        folder = tmp_path / "s"
        folder.mkdir()
        entry = {
            "type": "azure",
            "account_name": "testaccount",
            "container": "models",
            "sas_token": "?sv=2024-01-01&sig=signed-by-them",
            "endpoint_url": f"{endpoint}/testaccount",
        }
        (folder / "blobs").write_text(json.dumps(entry))
        puller = open_puller(storage_config_dir=folder)
        assert (await puller.fetch(request("m", KEY))).size_bytes == 35_003
