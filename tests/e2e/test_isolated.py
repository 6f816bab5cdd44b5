"""A model's own code that crashes, or takes too much memory, costs itself: through a whole mesh."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest

from protos import oip_pb2 as oip
from tests.e2e.asking import Asker, isvc, raw_request
from tests.e2e.conftest import StartMesh

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

Code = grpc.StatusCode
ALLOCATES = "self.kept = [bytearray(b'x' * (1 << 20)) for _ in range(10_240)]"
MODEL = """
import ctypes, os
import numpy as np

class Model:
    def load(self, path):
        {loads}
    def predict(self, inputs, parameters):
        if parameters.get("crash"):
            ctypes.string_at(0)
        return {{"y": inputs["x"] * 2, "pid": np.array([os.getpid()])}}
"""


def ask_for(name: str, *, crash: bool = False) -> oip.ModelInferRequest:
    request = raw_request(name, x=np.array([21.0], np.float32))
    request.parameters["crash"].bool_param = crash
    return request


def answer(asker: Asker, name: str) -> tuple[float, int]:
    """Twice 21, and the pid of the model's process."""
    y, pid = asker.infer(ask_for(name)).raw_output_contents
    return float(np.frombuffer(y, np.float32)[0]), int(np.frombuffer(pid, np.int64)[0])


def test_models_that_crash_or_take_too_much_cost_only_themselves(
    start_mesh: StartMesh, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    for name, loads in (("victim", "pass"), ("other", "pass"), ("giant", ALLOCATES)):
        (root / name).mkdir(parents=True)
        (root / name / "model.py").write_text(MODEL.format(loads=loads))
    flags = ("--file-root", str(root), "--instances", "1", "--routers", "1", "--allow-python")
    mesh = start_mesh(*flags, "--worker-memory", "256MiB", "--capacity", "1GiB").ready()
    with Asker(mesh.address) as asker:
        for name in ("victim", "other", "giant"):
            asker.apply(isvc(name, (root / name).as_uri(), "python"))
        other, victim = answer(asker, "other"), answer(asker, "victim")
        assert (other[0], victim[0]) == (42.0, 42.0)

        code, message = asker.refused(ask_for("victim", crash=True))
        assert code is Code.INTERNAL and "SIGSEGV" in message and "victim" in message, message
        back = answer(asker, "victim")
        assert back[0] == 42.0 and back[1] != victim[1]
        described = mesh.mesh("describe", "model", "victim").stdout
        assert "crashed: killed by SIGSEGV" in described, described

        code, message = asker.refused(ask_for("giant"))
        cause = "needed more than 268,435,456 bytes"
        assert code is Code.RESOURCE_EXHAUSTED and cause in message, message
        described = mesh.mesh("describe", "model", "giant").stdout
        assert "RESOURCE_EXHAUSTED" in described and cause in described, described

        assert answer(asker, "other") == other  # by the same process
        (instance,) = asker.rows("instances").values()
        assert instance["state"] == "READY"
