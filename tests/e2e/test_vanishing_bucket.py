"""A bucket that disappears while a model is pulled from it: cause, survival, and its return."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.e2e.asking import LABELS, Asker, eventually, flowers, isvc
from tests.e2e.conftest import StartMesh
from tests.e2e.test_failed_loads import with_key
from tests.puller.cloud_servers import GoogleServer

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

# A listing, a look for an object of that name, then the files one by one.
REQUESTS_BEFORE = 3


class S3Server(GoogleServer):
    """Google's XML listings and addresses are S3's; nobody is asked for a signature."""

    def why_denied(self, request: object) -> str:
        return ""


@contextlib.contextmanager
def serving(server: S3Server) -> Iterator[str]:
    """In a thread with a loop of its own, as the tests here have none."""
    started: list[str] = []
    ready, end = threading.Event(), threading.Event()

    async def serve() -> None:
        async with server.serving() as url:
            started.append(url)
            ready.set()
            await asyncio.to_thread(end.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(60)
        yield started[0]
    finally:
        end.set()
        thread.join()


def test_a_bucket_that_disappears_half_way_and_comes_back(
    start_mesh: StartMesh, samples: Path, tmp_path: Path
) -> None:
    model = (samples / "iris-0001" / "model.onnx").read_bytes()
    objects = {f"iris/notes-{number}.txt": b"words" * 1_000 for number in range(20)}
    server = S3Server("the-models", {**objects, "iris/model.onnx": model})
    server.gone_after = REQUESTS_BEFORE
    with serving(server) as endpoint:
        entry = {"type": "s3", "endpoint_url": endpoint, "bucket": "the-models"}
        entry |= {"access_key_id": "id", "secret_access_key": "secret"}
        (tmp_path / "storage").mkdir()
        (tmp_path / "storage" / "store").write_text(json.dumps(entry))
        mesh = start_mesh(
            *("--models", str(samples), "--storage-config", str(tmp_path / "storage")),
            *("--instances", "1", "--failure-expiry", "1s"),
        ).ready()
        pod = mesh.children()["instance-1"]
        with Asker(mesh.address) as ask:
            ask.apply(with_key(isvc("vanishing", ""), "store", "iris"))
            code, message = ask.refused(flowers("vanishing"))
            assert code is grpc.StatusCode.FAILED_PRECONDITION, message
            cause = "there is no bucket 'the-models'"
            assert cause in message and endpoint in message, message
            assert server.requests > REQUESTS_BEFORE
            row = ask.describe("vanishing")["row"]
            assert row["state"] == "LOADING_FAILED" and cause in row["failure"], row
            assert mesh.children()["instance-1"] == pod
            assert ask.labels("iris-0001") == LABELS
            server.gone_after = 1 << 30

            def answers() -> bool:
                with contextlib.suppress(grpc.RpcError):
                    return ask.labels("vanishing") == LABELS
                return False

            eventually(answers, "the model whose bucket is back")
