"""`mesh up` with its real children: etcd, a router, two instances, and a folder of models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.samples import INPUT, make_samples
from tests.up.live import REPOSITORY, LiveMesh

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

BODY = json.dumps(
    {
        "inputs": [
            {"name": INPUT, "shape": [1, 4], "datatype": "FP32", "data": [5.1, 3.5, 1.4, 0.2]}
        ],
        "outputs": [{"name": "label"}],
    }
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    make_samples(folder, 5)  # iris-0001 is the fifth
    return folder


@pytest.fixture(scope="module")
def live(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveMesh]:
    root = tmp_path_factory.mktemp("up")
    shutil.copytree(samples, root / "models")
    mesh = LiveMesh(root / "data", "--models", str(root / "models"), "--capacity", "32MiB")
    try:
        yield mesh.ready()
    finally:
        if mesh.process.poll() is None:
            mesh.stop()


def names(mesh: LiveMesh) -> set[str]:
    done = mesh.mesh("get", "models", "-o", "name")
    assert done.returncode == 0, done.stderr
    return {line.rpartition("/")[2] for line in done.stdout.splitlines()}


def ask(mesh: LiveMesh) -> object:
    done = mesh.mesh("infer", "iris-0001", "--json", "-", stdin=BODY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["outputs"][0]["data"]


def test_the_ready_block_names_addresses_and_a_request_that_works(live: LiveMesh) -> None:
    assert f"gRPC {live.address}" in live.out and f"REST {live.state['rest']}" in live.out
    assert "5 models from" in live.out
    lines = live.out.splitlines()
    curl = next(line for line in lines if line.strip().startswith("curl"))
    answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == json.loads(lines[-1])


def test_every_metrics_address_of_the_list_answers(live: LiveMesh) -> None:
    targets = json.loads((live.data_dir / "prometheus_sd.json").read_text())
    addresses = [address for entry in targets for address in entry["targets"]]
    assert len(addresses) == 3
    for address in addresses:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as reply:
            assert reply.status == 200 and b"# HELP" in reply.read()


def test_a_second_one_on_the_same_data_is_refused(live: LiveMesh) -> None:
    again = subprocess.run(
        [sys.executable, "-m", "mesh.cli", "up", "--data-dir", str(live.data_dir)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert again.returncode == 1
    assert f"pid {live.process.pid}" in again.stderr and len(again.stderr.splitlines()) == 1


def test_the_mesh_follows_its_folder(live: LiveMesh) -> None:
    models = live.data_dir.parent / "models"
    shutil.copytree(models / "iris-0001", models / "copied")
    live.until(lambda: "copied" in names(live), "the model that was added")
    done = live.mesh("infer", "copied", "--json", "-", stdin=BODY)
    assert json.loads(done.stdout)["model_name"] == "copied"
    shutil.rmtree(models / "copied")
    live.until(lambda: "copied" not in names(live), "the model's deletion")
    assert "iris-0001" in names(live)


def test_what_others_applied_is_left_alone_by_the_folder(live: LiveMesh) -> None:
    models = live.data_dir.parent / "models"
    manifest = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "by-hand"},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "onnx"},
                    "storageUri": (models / "iris-0001").as_uri(),
                }
            }
        },
    }
    done = live.mesh("apply", "-f", "-", "--wait", stdin=json.dumps(manifest))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "inferenceservice.serving.kserve.io/by-hand created\n"
    assert "1 loaded" in done.stderr
    (models / "bad.yaml").write_text("a: [")
    os.utime(models / "bad.yaml", (1, 1))
    live.until(lambda: "bad.yaml" in live.err, "the complaint about the bad file")
    assert "by-hand" in names(live)
    assert live.mesh("delete", "model", "by-hand").returncode == 0
    (models / "bad.yaml").unlink()


@pytest.mark.parametrize("victim", ["instance-1", "router-1", "etcd"])
def test_a_killed_child_comes_back_and_the_mesh_serves(live: LiveMesh, victim: str) -> None:
    before, complete = live.children()[victim], live.err.count("the mesh is complete again")
    os.kill(before, signal.SIGKILL)
    live.until(
        lambda: live.err.count("the mesh is complete again") > complete, f"{victim}'s return"
    )
    assert f"{victim} died (killed by SIGKILL)" in live.err
    assert live.children()[victim] != before
    live.until(
        lambda: live.mesh("infer", "iris-0001", "--json", "-", stdin=BODY).returncode == 0,
        "an answer",
    )


def test_stop_and_start_again_keeps_what_was_registered(samples: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = LiveMesh(data, "--models", str(samples), "--instances", "1").ready()
    try:
        assert ask(first) == [0]
        assert first.stop(signal.SIGINT) == 0
    finally:
        first.stop(signal.SIGKILL)
    assert first.err.splitlines()[-1] == "stopped"
    second = LiveMesh(data, "--file-root", str(samples), "--instances", "1").ready()
    try:
        assert "iris-0001" in names(second)
        assert ask(second) == [0]
        assert second.stop() == 0
    finally:
        second.stop(signal.SIGKILL)


def test_nothing_outlives_a_mesh_up_that_is_killed(tmp_path: Path) -> None:
    mesh = LiveMesh(tmp_path / "data", "--instances", "1").ready()
    assert sorted(mesh.children()) == ["etcd", "instance-1", "router-1"]
    assert mesh.stop(signal.SIGKILL) == -signal.SIGKILL
