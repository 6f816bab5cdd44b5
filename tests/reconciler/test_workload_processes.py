"""The commands, variables and files of the pods that the controller makes, run as processes.

In place of a kubelet the test fills in what the downward API would, and folders for the mounts.
"""

from __future__ import annotations

import base64
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
from tests.deploy.manifests import DEPLOY, documents
from tests.etcd_server import EtcdServer, free_port

pytestmark = [pytest.mark.etcd, pytest.mark.e2e]
READY_TIMEOUT_S = 60.0
FIELDS = {
    "metadata.name": "pod-1",
    "status.podIP": "127.0.0.1",
    "metadata.labels['pod-template-hash']": "abc",
}


def config(etcd: EtcdServer) -> ControllerConfig:
    return ControllerConfig(
        etcd=PodEtcd((etcd.endpoint,), "mesh"),
        grpc_port=free_port(),
        rest_port=free_port(),
        metrics_port=free_port(),
    )


@contextlib.contextmanager
def running(objects: tuple[Obj, ...], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The first container of the Deployment. Every mount is a folder below ``folder``."""
    by_kind = {one["kind"]: one for one in objects}
    container = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    mounts = {m["mountPath"]: folder / m["name"] for m in container["volumeMounts"]}
    for path in mounts.values():
        path.mkdir(parents=True)
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
    with EtcdServer() as etcd:
        ours, theirs = config(etcd), config(etcd)
        pod = runtime_objects(RuntimeSource.of(document), ours, namespace="n", replicas=1)
        router = router_objects(theirs, namespace="n")
        with (
            running(pod, tmp_path / "pod") as instance,
            running(router, tmp_path / "router") as front,
        ):
            wait_ready(ours.metrics_port, instance, tmp_path / "pod" / "log")
            wait_ready(theirs.metrics_port, front, tmp_path / "router" / "log")
            record = etcd_get(etcd, "/mesh/n/instances/")
            assert f'"127.0.0.1:{ours.grpc_port}"' in record
            for said in ("rt:mesh-1.x", "modelmesh-serving-mesh-1.x", "abc", "pod-1"):
                assert said in record
            # What a kubelet sends; both leave in their time and with a good word.
            for process in (instance, front):
                process.send_signal(signal.SIGTERM)
            assert [one.wait(timeout=60) for one in (instance, front)] == [0, 0]
        assert etcd_get(etcd, "/mesh/n/instances/") == ""


def etcd_get(etcd: EtcdServer, prefix: str) -> str:
    """Keys and values below a prefix, by etcd's JSON gateway."""
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    body = {
        "key": base64.b64encode(prefix.encode()).decode(),
        "range_end": base64.b64encode(end.encode()).decode(),
    }
    request = urllib.request.Request(
        f"http://{etcd.endpoint}/v3/kv/range", data=json.dumps(body).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        found = json.load(reply).get("kvs", [])
    return "\n".join(
        base64.b64decode(kv[part]).decode() for kv in found for part in ("key", "value")
    )
