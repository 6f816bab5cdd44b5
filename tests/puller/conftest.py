from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from mesh.artifacts import ArtifactRequest
from puller.puller import Puller, PullerSettings
from tests.puller.fakes import FakeStore

AWS_KEYS = {"AWS_ACCESS_KEY_ID": "test-key-id", "AWS_SECRET_ACCESS_KEY": "test-secret"}

OpenPuller = Callable[..., Puller]


def request(path: str, key: str = "") -> ArtifactRequest:
    return ArtifactRequest(model_id="m", path=path, key=key, model_type="onnx")


def leftovers(cache_dir: Path) -> list[str]:
    """What lies in staging, below the processes' folders."""
    return sorted(str(path.relative_to(cache_dir)) for path in cache_dir.glob("staging/*/*"))


def owners(cache_dir: Path) -> list[str]:
    """The processes that have a folder in staging."""
    return sorted(path.name for path in cache_dir.glob("staging/*"))


def entries(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.glob("entries/*"))


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., PullerSettings]:
    """Settings with small parts and no waiting to speak of."""

    def make(**changes: Any) -> PullerSettings:
        values: dict[str, Any] = {
            "cache_dir": tmp_path / "cache",
            "cache_capacity_bytes": 1 << 20,
            "part_bytes": 10_000,
            "chunk_bytes": 1_000,
            "parallelism": 4,
            "backoff_base_ms": 1,
            "backoff_max_ms": 2,
            "store_env": AWS_KEYS,
            "fsync": False,
        }
        return PullerSettings(**{**values, **changes})

    return make


@pytest.fixture
async def open_puller(settings: Callable[..., PullerSettings]) -> AsyncIterator[OpenPuller]:
    """A puller on a fake store (``store=``) or on the real back end; closed at the end."""
    opened: list[Puller] = []

    def make(store: FakeStore | None = None, disk: Any = None, **changes: Any) -> Puller:
        extra = {} if store is None else {"open_source": store.open}
        puller = Puller(settings(**changes), disk=disk, **extra)
        opened.append(puller)
        return puller

    yield make
    closings: list[Awaitable[None]] = [puller.close() for puller in opened]
    for closing in closings:
        await closing


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto_endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=moto_endpoint,
        aws_access_key_id="test-key-id",
        aws_secret_access_key="test-secret",
        region_name="us-east-1",
    )


@pytest.fixture
def bucket(s3: Any, request: pytest.FixtureRequest) -> str:
    """A bucket of the test's own."""
    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**12}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def moto_env(moto_endpoint: str) -> dict[str, str]:
    return {**AWS_KEYS, "AWS_ENDPOINT_URL": moto_endpoint}
