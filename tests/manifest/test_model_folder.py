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
            "t", "t", "onnx", "t", id="all versions together",
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
        pytest.param(["m/model.pt2"], "m", "m", "pytorch", "m", id="an exported program"),
        pytest.param(["k.keras"], "k.keras", "k", "tensorflow", "k.keras", id="Keras"),
        pytest.param(["k.h5"], "k.h5", "k", "tensorflow", "k.h5", id="Keras in HDF5"),
        pytest.param(["l.tflite"], "l.tflite", "l", "tflite", "l.tflite", id="LiteRT"),
        pytest.param(["m/model.py"], "m", "m", "python", "m", id="code"),
        pytest.param(
            ["m/1/model.savedmodel/saved_model.pb", "m/README.md"], "m", "m", "tensorflow", "m",
            id="a SavedModel as Triton lays it out",
        ),
        pytest.param(["m/.hidden.pt", "m/a.onnx"], "m", "m", "onnx", "m", id="hidden files"),
        pytest.param(["My_Net/a.onnx"], "My_Net", "My_Net", "onnx", "My_Net", id="any name"),
    ],
)  # fmt: skip
def test_laid_out(
    tmp_path: Path, files: list[str], entry: str, name: str, model_type: str, artifact: str
) -> None:
    for file in files:
        write(tmp_path / file, b"" if file.endswith(".pbtxt") else b"x")
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
        pytest.param(
            ["m/1/readme.md"], "m", "m: version 1: expected a model file", id="an empty version"
        ),
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


BOOSTERS = [
    pytest.param("m.json", b' {"version":[3,2,0],"learner":{}}', "xgboost", id="xgboost's JSON"),
    pytest.param("m.ubj", b"", "xgboost", id="xgboost's UBJSON"),
    pytest.param("m.bst", b"{L\0\0\0\0\0\0\0\x07learner{", "xgboost", id="UBJSON as .bst"),
    pytest.param("m.bst", b"binf\0", "xgboost", id="old xgboost"),
    pytest.param("m.bst", b"tree\nversion=v4\n", "lightgbm", id="lightgbm as .bst"),
    pytest.param("m.txt", b"tree\r\nversion=v4\r\n", "lightgbm", id="lightgbm's text"),
]


@pytest.mark.parametrize(("name", "content", "model_type"), BOOSTERS)
def test_boosters_are_told_by_their_first_bytes(
    tmp_path: Path, name: str, content: bytes, model_type: str
) -> None:
    file = write(tmp_path / name, content)
    assert looks_like_model(file)
    assert model_from_path(file).model.model_type == model_type
    write(tmp_path / "folder" / name, content)
    assert model_from_path(tmp_path / "folder").model.model_type == model_type


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", b"trees are green"),
        ("manifest.json", b'{"kind": "InferenceService"}'),
        ("teachers.json", b'{"pupil": "learner"}'),
        ("model.py", b"print()"),
        ("model-settings.json", b'{"learner": 1}'),
    ],
)
def test_a_file_that_only_ends_like_a_model_is_none(
    tmp_path: Path, name: str, content: bytes
) -> None:
    assert not looks_like_model(write(tmp_path / name, content))


def test_a_description_tells_the_format(tmp_path: Path) -> None:
    write(tmp_path / "m" / "1" / "weights", b"x")
    write(
        tmp_path / "m" / "config.pbtxt",
        b'backend: "onnxruntime" default_model_filename: "weights"',
    )
    assert model_from_path(tmp_path / "m").model.model_type == "onnx"


def test_a_wrong_description_is_told_when_the_model_is_registered(tmp_path: Path) -> None:
    write(tmp_path / "m" / "model.onnx")
    write(tmp_path / "m" / "config.pbtxt", b"max_batch_size: many")
    with pytest.raises(InvalidArgument) as caught:
        model_from_path(tmp_path / "m")
    assert caught.value.message.startswith(f"{tmp_path / 'm'}: config.pbtxt: not a model config")


def test_a_new_version_is_a_changed_spec(tmp_path: Path) -> None:
    write(tmp_path / "m" / "1" / "model.onnx")
    first = model_from_path(tmp_path / "m").model.model_id
    write(tmp_path / "m" / "2" / "model.onnx")
    assert model_from_path(tmp_path / "m").model.model_id != first
