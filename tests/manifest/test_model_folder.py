"""Models laid out as files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesh.core.errors import InvalidArgument
from mesh.manifest import parse_resource
from mesh.model_folder import looks_like_model, model_from_path, resource_from_path


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("files", "entry", "name", "model_type", "artifact"),
    [
        pytest.param(["iris/model.onnx"], "iris", "iris", "onnx", "iris", id="a folder"),
        pytest.param(["d.skops"], "d.skops", "d", "sklearn", "d.skops", id="a file"),
        pytest.param(["a.ONNX"], "a.ONNX", "a", "onnx", "a.ONNX", id="an ending in capitals"),
        pytest.param(
            ["t/1/model.onnx", "t/10/model.onnx", "t/9/model.onnx", "t/config.pbtxt"],
            "t", "t", "onnx", "t/10", id="the highest version",
        ),
        pytest.param(
            ["m/model.onnx", "m/weights.bin", "m/labels.txt"], "m", "m", "onnx", "m",
            id="what lies beside it",
        ),
        pytest.param(
            ["m/model.onnx", "m/tokenizer.onnx"], "m", "m", "onnx", "m", id="the one named model"
        ),
        pytest.param(
            ["m/saved_model.pb", "m/variables/x"], "m", "m", "tensorflow", "m", id="a SavedModel"
        ),
        pytest.param(["m/model.joblib"], "m", "m", "sklearn", "m", id="joblib"),
        pytest.param(["m/.hidden.pt", "m/a.onnx"], "m", "m", "onnx", "m", id="hidden files"),
        pytest.param(["My_Net/a.onnx"], "My_Net", "My_Net", "onnx", "My_Net", id="any name"),
    ],
)  # fmt: skip
def test_laid_out(
    tmp_path: Path, files: list[str], entry: str, name: str, model_type: str, artifact: str
) -> None:
    for file in files:
        write(tmp_path / file)
    assert looks_like_model(tmp_path / entry)
    found = model_from_path(tmp_path / entry, now_ms=5)
    assert (found.name, found.model.model_type) == (name, model_type)
    assert found.model.path == (tmp_path / artifact).as_uri()
    assert found.model.model_id.startswith(f"{name}__isvc-")
    assert (found.model.created_at_ms, found.model.auto_delete) == (5, True)
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("files", "entry", "said"),
    [
        pytest.param([], "nothing", "found nothing", id="nothing there"),
        pytest.param(["m/readme.md"], "m", "expected a model file", id="no model in it"),
        pytest.param(["m/1/readme.md"], "m", "/m/1: expected a model file", id="an empty version"),
        pytest.param(["notes.txt"], "notes.txt", "found .txt", id="not a model file"),
        pytest.param(["m/a.onnx", "m/b.skops"], "m", "several formats", id="two formats"),
        pytest.param(["m/a.onnx", "m/b.onnx"], "m", "named model.*", id="two of one format"),
        pytest.param(["m/model.bst"], "m", "xgboost or lightgbm", id="an ambiguous ending"),
        pytest.param(["a.bst"], "a.bst", "xgboost or lightgbm", id="an ambiguous file"),
        pytest.param(["a\x01/m.onnx"], "a\x01", "control characters", id="a bad name"),
    ],
)
def test_not_a_model(tmp_path: Path, files: list[str], entry: str, said: str) -> None:
    for file in files:
        write(tmp_path / file)
    with pytest.raises(InvalidArgument) as caught:
        model_from_path(tmp_path / entry)
    assert said in caught.value.message
    assert str(tmp_path / entry) in caught.value.message


def test_applying_the_resource_is_the_same_model(tmp_path: Path) -> None:
    write(tmp_path / "Net_1" / "model.onnx")
    resource = resource_from_path(tmp_path / "Net_1")
    assert parse_resource(resource) == model_from_path(tmp_path / "Net_1")


def test_a_replaced_file_is_a_changed_spec(tmp_path: Path) -> None:
    file = write(tmp_path / "m" / "model.onnx")
    os.utime(file, ns=(10**18, 10**18))
    first = model_from_path(tmp_path / "m").model.model_id
    assert model_from_path(tmp_path / "m").model.model_id == first
    os.utime(file, ns=(10**18, 10**18 + 1))
    touched = model_from_path(tmp_path / "m").model.model_id
    write(tmp_path / "m" / "weights.bin", b"more")
    assert len({first, touched, model_from_path(tmp_path / "m").model.model_id}) == 3


def test_what_is_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / ".git").mkdir()
    taken = {p: looks_like_model(tmp_path / p) for p in ("folder", ".git", "a.onnx", "a.yaml", "x")}
    assert taken == {"folder": True, ".git": False, "a.onnx": True, "a.yaml": False, "x": False}
