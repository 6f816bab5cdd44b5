"""`mesh pull` as a process: what is in the folder afterwards, and what it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def url(site: Path) -> Iterator[str]:
    """Python's own file server: no ranges, no ETag, but the time of the last change."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def pull(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MESH_")}
    return subprocess.run(
        [sys.executable, "-m", "mesh.cli", "pull", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**kept, **environment},
        check=False,
        timeout=120,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_archive_is_unpacked_and_a_second_run_has_nothing_to_do(
    tmp_path: Path, site: Path, url: str
) -> None:
    with zipfile.ZipFile(site / "m.zip", "w") as archive:
        archive.writestr("m/1/model.onnx", b"model")
    target = tmp_path / "target"
    first = pull(f"{url}/m.zip", target)
    assert first.returncode == 0, first.stderr
    assert (target / "1/model.onnx").read_bytes() == b"model"
    assert names(tmp_path) == ["site", "target"]
    second = pull(f"{url}/m.zip", target)
    assert second.returncode == 0
    assert "already" in second.stdout


def test_the_same_folder_takes_another_artifact(tmp_path: Path, site: Path) -> None:
    (site / "a").write_bytes(b"a")
    (site / "b").write_bytes(b"b")
    target = tmp_path / "target"
    target.mkdir()
    assert pull(f"file://{site}/a", target).returncode == 0
    assert pull(f"file://{site}/b", target).returncode == 0
    assert names(target) == [".mesh-pull.json", "b"]


def test_a_folder_that_is_somebody_elses_is_left_alone(tmp_path: Path, site: Path) -> None:
    (site / "a").write_bytes(b"a")
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_bytes(b"x")
    done = pull(f"file://{site}/a", target)
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert names(target) == ["precious"]


def test_a_refusal_ends_with_1_and_leaves_nothing(tmp_path: Path, url: str) -> None:
    done = pull(f"{url}/nope", tmp_path / "target")
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert names(tmp_path) == ["site"]


def test_a_store_that_is_away_ends_with_3(tmp_path: Path) -> None:
    done = pull("http://127.0.0.1:1/m", tmp_path / "target")
    assert done.returncode == 3
    assert "no connection" in done.stderr
    assert not (tmp_path / "target").exists()


def test_a_wrong_command_line_ends_with_2(tmp_path: Path) -> None:
    done = pull("s3://b/m", tmp_path / "target", "--storage-param", "bucket")
    assert done.returncode == 2
    assert "write NAME=VALUE" in done.stderr


def test_a_storage_key_of_the_environment_is_used(tmp_path: Path, site: Path, url: str) -> None:
    (site / "m").write_bytes(b"model")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "web").write_text(json.dumps({"type": "http", "url": url}))
    done = pull("m", tmp_path / "target", MESH_STORAGE_CONFIG=str(secret), MESH_STORAGE_KEY="web")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target/m").read_bytes() == b"model"
