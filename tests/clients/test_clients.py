"""Clients that others wrote, each in a process of its own: they cannot be imported together.

`make test` installs them into .venv-clients; MESH_CLIENT_PYTHON names another interpreter that has
them. perf_analyzer is used where it is on the PATH, in that environment, or at MESH_PERF_ANALYZER.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.up.live import REPOSITORY, LiveMesh

pytestmark = [pytest.mark.client, pytest.mark.e2e, pytest.mark.etcd]

HERE = Path(__file__).parent
PYTHON = Path(
    os.environ.get("MESH_CLIENT_PYTHON") or REPOSITORY / ".venv-clients" / "bin" / "python"
)
# The scripts take seconds; importing kserve on a loaded machine takes ten.
TIMEOUT_S = 120


def test_models_made_just_before_are_there_when_the_mesh_is_ready(mesh: LiveMesh) -> None:
    assert "5 models from" in mesh.out


@pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no {PYTHON}: `make test` installs the clients there"
)
@pytest.mark.parametrize("script", ["triton_script.py", "kserve_script.py"])
def test_a_client_library(mesh: LiveMesh, script: str) -> None:
    addresses = (mesh.address, str(mesh.state["rest"]))
    done = subprocess.run(
        [str(PYTHON), str(HERE / script), *addresses],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    assert done.stdout.splitlines()[-1] == "passed"


def perf_analyzer() -> str | None:
    beside = PYTHON.parent / "perf_analyzer"
    named = os.environ.get("MESH_PERF_ANALYZER")
    return named or (str(beside) if beside.exists() else shutil.which("perf_analyzer"))


def libraries_beside(program: str) -> str:
    """The wheel's binary wants CUDA's runtime library; pip puts that below site-packages."""
    found = Path(program).resolve().parent.parent.glob("lib/python*/site-packages/nvidia/*/lib")
    return os.pathsep.join([*map(str, found), os.environ.get("LD_LIBRARY_PATH", "")])


@pytest.mark.parametrize("mode", [("--sync",), ("--async", "--streaming")], ids=["unary", "stream"])
def test_perf_analyzer(mesh: LiveMesh, mode: tuple[str, ...], tmp_path: Path) -> None:
    program = perf_analyzer()
    if program is None:
        pytest.skip("no perf_analyzer: name one with MESH_PERF_ANALYZER")
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries_beside(program)}
    usable = subprocess.run([program, "--version"], capture_output=True, env=environment)
    if b"error while loading" in usable.stderr:
        pytest.skip(f"perf_analyzer does not start here: {usable.stderr.decode()[-200:]}")
    report = tmp_path / "report.csv"
    command = [program, "-m", "iris-0001", "-u", mesh.address, "-i", "grpc", "--shape", "input:1,4"]
    command += [*mode, "--concurrency-range", "2", "-p", "300", "--max-trials", "4", "-s", "90"]
    done = subprocess.run(
        [*command, "-f", str(report)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    header, row = report.read_text().splitlines()[:2]
    measured = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(measured["Inferences/Second"]) > 0
    assert "Failed" not in done.stdout, done.stdout[-2_000:]
