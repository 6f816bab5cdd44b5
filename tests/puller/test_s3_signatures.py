"""A wrong secret is refused: against a server that checks signatures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.core.errors import Code, LoadFailed
from tests.puller.conftest import OpenPuller, entries, leftovers, request

ACCESS_KEY, SECRET = "ACCESSKEYOFTEST", "the-right-secret-of-the-test"


@pytest.fixture(scope="module")
def signing_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("rclone")
    (root / "bucket-1/m").mkdir(parents=True)
    (root / "bucket-1/m/model.onnx").write_bytes(b"model")
    command = [str(Path(sys.executable).parent / "rclone"), "serve", "s3"]
    command += ["--config", "/dev/null", "--addr", "127.0.0.1:0"]
    command += ["--auth-key", f"{ACCESS_KEY},{SECRET}", str(root)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            for line in server.stderr:
                if "Starting s3 server on" in line:
                    yield line.split("[")[1].split("]")[0].rstrip("/")
                    break
            else:
                pytest.fail("rclone did not start")
        finally:
            server.kill()
            server.wait(timeout=60)


def secret_dir(directory: Path, endpoint: str, **changes: str) -> Path:
    entry = {
        "type": "s3",
        "access_key_id": ACCESS_KEY,
        "secret_access_key": SECRET,
        "endpoint_url": endpoint,
        "bucket": "bucket-1",
        **changes,
    }
    directory.mkdir(exist_ok=True)
    (directory / "my-store").write_text(json.dumps(entry))
    return directory


KEY = '{"storage_key": "my-store"}'


async def test_the_right_secret_is_let_in(
    open_puller: OpenPuller, signing_endpoint: str, tmp_path: Path
) -> None:
    config = secret_dir(tmp_path / "secret", signing_endpoint)
    artifact = await open_puller(storage_config_dir=config).fetch(request("m", KEY))
    assert (artifact.path / "model.onnx").read_bytes() == b"model"


@pytest.mark.parametrize(
    "changes", [{"secret_access_key": "a-wrong-secret"}, {"access_key_id": "SOMEBODYELSES"}]
)
async def test_a_wrong_secret_is_refused_and_not_shown(
    open_puller: OpenPuller,
    signing_endpoint: str,
    tmp_path: Path,
    cache_dir: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, str],
) -> None:
    caplog.set_level("DEBUG")
    config = secret_dir(tmp_path / "secret", signing_endpoint, **changes)
    with pytest.raises(LoadFailed, match="refused access with storage key 'my-store'") as caught:
        await open_puller(storage_config_dir=config).fetch(request("m", KEY))
    error = caught.value
    assert error.code is Code.FAILED_PRECONDITION
    assert "s3://bucket-1/m" in error.message
    told = f"{error!r} {error.__cause__!r} {caplog.text}"
    for secret in (SECRET, "a-wrong-secret"):
        assert secret not in told
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_a_replaced_secret_counts_at_once_in_both_directions(
    open_puller: OpenPuller, signing_endpoint: str, tmp_path: Path
) -> None:
    """Stores and artifacts are kept between fetches; what a key was allowed is not."""
    directory = tmp_path / "secret"
    puller = open_puller(storage_config_dir=directory)
    secret_dir(directory, signing_endpoint, secret_access_key="a-wrong-secret")
    with pytest.raises(LoadFailed, match="refused"):
        await puller.fetch(request("m", KEY))
    secret_dir(directory, signing_endpoint)
    puller.release(await puller.fetch(request("m", KEY)))
    secret_dir(directory, signing_endpoint, secret_access_key="a-wrong-secret")
    with pytest.raises(LoadFailed, match="refused"):
        await puller.fetch(request("m", KEY))
