"""The commands, variables and files of the pods that the controller makes, run as processes.

In place of a kubelet the test fills in what the downward API would, and folders for the mounts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.reconciler.config import ControllerConfig, PodEtcd
from mesh.reconciler.kube_resources import Obj
from mesh.reconciler.workload import RuntimeSource, runtime_objects
from mesh.reconciler.workload_pod import RUNTIME_FILE
from mesh.reconciler.workload_router import router_objects
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_connection import load_etcd_connection
from tests.deploy.manifests import DEPLOY, documents
from tests.etcd_access import USER, enable_users, make_certificates
from tests.etcd_server import EtcdServer, free_port

pytestmark = [pytest.mark.etcd, pytest.mark.e2e]
READY_TIMEOUT_S = 60.0
FIELDS = {
    "metadata.name": "pod-1",
    "status.podIP": "127.0.0.1",
    "metadata.labels['pod-template-hash']": "abc",
}


def config() -> ControllerConfig:
    return ControllerConfig(
        etcd=PodEtcd(("etcd.invalid:1",), "not-this", from_secret=True),
        grpc_port=free_port(),
        rest_port=free_port(),
        metrics_port=free_port(),
    )


@contextlib.contextmanager
def running(
    objects: tuple[Obj, ...], folder: Path, secret: dict[str, bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """The first container of the Deployment. Every mount is a folder below ``folder``; ``secret``
    is what etcd's has in it."""
    by_kind = {one["kind"]: one for one in objects}
    container = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    mounts = {m["mountPath"]: folder / m["name"] for m in container["volumeMounts"]}
    for path in mounts.values():
        path.mkdir(parents=True)
    for name, data in secret.items():
        (folder / "etcd-connection" / name).write_bytes(data)
    if "ConfigMap" in by_kind:
        (folder / "runtime" / RUNTIME_FILE).write_text(by_kind["ConfigMap"]["data"][RUNTIME_FILE])
    env = {"PATH": os.environ["PATH"]}
    for one in container["env"]:
        env[one["name"]] = value_of(one, mounts)
    for host in ("MESH_HOST", "MESH_METRICS_HOST", "MESH_INSTANCE_HOST"):
        if env.get(host) == "0.0.0.0":
            env[host] = "127.0.0.1"  # tests listen on loopback only
    program, *arguments = container["command"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / program, *arguments],
            env=env,
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def value_of(one: dict[str, Any], mounts: dict[str, Path]) -> str:
    if "valueFrom" in one:
        return FIELDS[one["valueFrom"]["fieldRef"]["fieldPath"]]
    text: str = one["value"]
    for path, folder in mounts.items():
        if text == path or text.startswith(f"{path}/"):
            return str(folder) + text.removeprefix(path)
    return text


def wait_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5),
        ):
            return
        time.sleep(0.05)
    raise AssertionError(f"not ready:\n{log.read_text()}")


def test_a_serving_pod_and_a_router_come_up_as_they_are_told(tmp_path: Path) -> None:
    (document,) = documents(DEPLOY / "runtimes" / "mesh-1.x.yaml")
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    make_certificates(certificates)
    ours, theirs = config(), config()
    with EtcdServer(certificates=certificates) as etcd:
        enable_users(etcd, password="secret", prefix="/mine/n/")
        secret = etcd_secret(etcd, certificates)
        pod = runtime_objects(RuntimeSource.of(document), ours, namespace="n", replicas=1)
        router = router_objects(theirs, namespace="n")
        with (
            running(pod, tmp_path / "pod", secret) as instance,
            running(router, tmp_path / "router", secret) as front,
        ):
            wait_ready(ours.metrics_port, instance, tmp_path / "pod" / "log")
            wait_ready(theirs.metrics_port, front, tmp_path / "router" / "log")
            mounted = tmp_path / "router" / "etcd-connection" / "etcd_connection"
            record = asyncio.run(keys_and_values(mounted, "instances/"))
            assert f'"127.0.0.1:{ours.grpc_port}"' in record
            for said in ("rt:mesh-1.x", "modelmesh-serving-mesh-1.x", "abc", "pod-1"):
                assert said in record
            # What a kubelet sends; both leave in their time and with a good word.
            for process in (instance, front):
                process.send_signal(signal.SIGTERM)
            assert [one.wait(timeout=60) for one in (instance, front)] == [0, 0]
        assert asyncio.run(keys_and_values(mounted, "instances/")) == ""
    for name in ("pod", "router"):
        assert '"secret"' not in (tmp_path / name / "log").read_text()


def etcd_secret(etcd: EtcdServer, certificates: Path) -> dict[str, bytes]:
    """ModelMesh's, with its certificates beside the JSON."""
    names = {"ca.crt": "ca.pem", "tls.crt": "client.pem", "tls.key": "client.key"}
    said = {
        "endpoints": f"https://{etcd.endpoint}",
        "root_prefix": "mine",
        "userid": USER,
        "password": "secret",
        "certificate_file": "ca.crt",
        "client_certificate_file": "tls.crt",
        "client_key_file": "tls.key",
    }
    files = {name: (certificates / file).read_bytes() for name, file in names.items()}
    return {"etcd_connection": json.dumps(said).encode(), **files}


async def keys_and_values(secret: Path, prefix: str) -> str:
    found = load_etcd_connection(secret)
    store = EtcdStore(found.options, prefix=found.prefix, namespace="n")
    try:
        items = (await store.range(prefix)).items
    finally:
        await store.close()
    return "\n".join(f"{one.key}\n{one.value.decode()}" for one in items)
