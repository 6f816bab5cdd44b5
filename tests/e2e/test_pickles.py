"""joblib and pickle files load where the operator allows them, and there only."""

from __future__ import annotations

import pickle
from pathlib import Path

import joblib
import pytest
from sklearn.dummy import DummyClassifier

from tests.e2e.asking import Asker, isvc, rest
from tests.e2e.conftest import StartMesh

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_allowed_pickles_answer(start_mesh: StartMesh, tmp_path: Path) -> None:
    model = DummyClassifier(strategy="constant", constant=7).fit([[0.0], [1.0]], [7, 8])
    for name in ("by-joblib", "by-pickle"):
        (tmp_path / "root" / name).mkdir(parents=True)
    joblib.dump(model, tmp_path / "root" / "by-joblib" / "model.joblib")
    (tmp_path / "root" / "by-pickle" / "model.pkl").write_bytes(pickle.dumps(model))
    flags = ("--file-root", str(tmp_path / "root"), "--instances", "1", "--allow-pickle")
    mesh = start_mesh(*flags).ready()
    with Asker(mesh.address) as ask:
        for name in ("by-joblib", "by-pickle"):
            ask.apply(isvc(name, (tmp_path / "root" / name).as_uri(), "sklearn"))
            path = f"/v1/models/{name}:predict"
            answer = rest(str(mesh.state["rest"]), "POST", path, {"instances": [[3.0]]})
            assert answer == (200, {"predictions": [7]})
