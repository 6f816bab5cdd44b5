"""One mesh for all tests that do it no harm, and a maker of meshes for those that do.

Both are started by the real command. Each mesh must end with status 0 after SIGTERM, with none of
its processes left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from mesh.samples import make_samples
from tests.e2e.asking import Asker
from tests.up.live import LiveMesh

SAMPLES = 14
# Each of two instances; the samples need about 4 MB.
CAPACITY = "1536KiB"
AWS = {"AWS_ACCESS_KEY_ID": "test-key-id", "AWS_SECRET_ACCESS_KEY": "test-secret"}


@dataclass(frozen=True)
class Shared:
    """The mesh that tests share. ``root`` is a folder of tests' own models that it may read."""

    mesh: LiveMesh
    grpc: str
    rest: str
    root: Path
    models: Path
    storage_config: Path
    bucket: str


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    make_samples(folder, SAMPLES)
    return folder


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def bucket(s3_endpoint: str, samples: Path) -> str:
    """A bucket that holds iris-0001 below ``models/iris``."""
    store = boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        aws_access_key_id=AWS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=AWS["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    store.create_bucket(Bucket="the-models")
    content = (samples / "iris-0001" / "model.onnx").read_bytes()
    store.put_object(Bucket="the-models", Key="models/iris/model.onnx", Body=content)
    return "the-models"


@pytest.fixture(scope="session")
def shared(
    samples: Path, s3_endpoint: str, bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    base = tmp_path_factory.mktemp("shared")
    models, root, secrets = base / "models", base / "root", base / "storage-config"
    shutil.copytree(samples, models)
    root.mkdir()
    secrets.mkdir()
    entry = {
        "type": "s3",
        "access_key_id": AWS["AWS_ACCESS_KEY_ID"],
        "secret_access_key": AWS["AWS_SECRET_ACCESS_KEY"],
        "endpoint_url": s3_endpoint,
        "bucket": bucket,
        "region": "us-east-1",
    }
    (secrets / "my-store").write_text(json.dumps(entry))
    flags = (
        *("--models", str(models), "--file-root", str(root), "--storage-config", str(secrets)),
        *("--capacity", CAPACITY, "--routers", "2"),
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**AWS, "AWS_ENDPOINT_URL": s3_endpoint}.items():
            environment.setenv(name, value)
        mesh = LiveMesh(base / "data", *flags)
    with ended_well(mesh):
        mesh.ready()
        yield Shared(mesh, mesh.address, str(mesh.state["rest"]), root, models, secrets, bucket)


@pytest.fixture
def ask(shared: Shared) -> Iterator[Asker]:
    with Asker(shared.grpc) as asker:
        yield asker


StartMesh = Callable[..., LiveMesh]


@pytest.fixture
def start_mesh(tmp_path: Path) -> Iterator[StartMesh]:
    """``start_mesh(*flags)`` starts a mesh that a test may break, on ``tmp_path/data``."""
    with contextlib.ExitStack() as started:

        def start(*flags: str) -> LiveMesh:
            mesh = LiveMesh(tmp_path / "data", *flags)
            started.enter_context(ended_well(mesh))
            return mesh

        yield start


@contextlib.contextmanager
def ended_well(mesh: LiveMesh) -> Iterator[None]:
    """Status 0 after SIGTERM; ``LiveMesh.stop`` also waits for every child."""
    try:
        yield
    except BaseException:
        mesh.stop()
        raise
    if mesh.process.poll() is None:
        assert mesh.stop() == 0, mesh.err
