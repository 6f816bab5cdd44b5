"""TensorFlow models answer as the library does, and what is wrong with them is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris

from mesh.core.errors import InvalidArgument, LoadFailed
from mesh.runtimes.api import ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.registry import RuntimeRegistry

X = load_iris().data.astype(np.float32)
REGISTRY = RuntimeRegistry()
RUNTIME = REGISTRY.format_runtime("tensorflow")


def spec(path: Path, **options: object) -> ModelSpec:
    return ModelSpec("m", "tensorflow", path, options=ModelOptions(**options))


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "saved"])
def test_answers_equal_the_librarys_own(keras_models: Path, name: str) -> None:
    model = RUNTIME.load(spec(keras_models / name))
    (one,) = model.metadata.inputs
    assert (one.datatype, one.shape) == ("FP32", (-1, 4))
    (answer,) = model.infer({one.name: X}, (), {})
    np.testing.assert_allclose(answer.data, np.load(keras_models / "expected.npy"), atol=1e-6)
    assert model.size_bytes > 0


def test_text_goes_in_and_out_as_bytes(keras_models: Path) -> None:
    model = RUNTIME.load(spec(keras_models / "texts"))
    assert model.metadata.inputs == (TensorSpec("text", "BYTES", (-1,)),)
    assert {s.name: s.datatype for s in model.metadata.outputs} == {
        "length": "INT32",
        "upper": "BYTES",
    }
    (answer,) = model.infer({"text": np.array([b"abc", b"d"], dtype=object)}, ("upper",), {})
    assert answer.data.tolist() == [b"ABC", b"D"]


def test_a_layer_that_is_code_is_refused(keras_models: Path) -> None:
    with pytest.raises(LoadFailed, match=r"cannot load lambda.keras"):
        RUNTIME.load(spec(keras_models / "lambda.keras"))


def test_a_signature_that_is_not_there_is_named(keras_models: Path) -> None:
    with pytest.raises(LoadFailed, match=r"no signature 'other'; it has \['serv"):
        RUNTIME.load(spec(keras_models / "saved", parameters={"signature": "other"}))


def test_what_the_model_refuses_is_the_clients_mistake(keras_models: Path) -> None:
    model = RUNTIME.load(spec(keras_models / "saved"))
    name = model.metadata.inputs[0].name
    with pytest.raises(InvalidArgument, match="TensorFlow refused the input"):
        model.infer({name: np.ones((2, 5), np.float32)}, (), {})


def test_what_is_cut_off_or_something_else_is_refused(keras_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(keras_models / "saved", folder)
    graph = folder / "saved_model.pb"
    graph.write_bytes(graph.read_bytes()[:1_000])
    (tmp_path / "model.keras").write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    for path, words in (
        (folder, "cannot load saved"),
        (tmp_path / "model.keras", r"cannot load model.keras"),
        (tmp_path / "empty", r"found none"),
    ):
        with pytest.raises(LoadFailed, match=words):
            RUNTIME.load(spec(path))


def test_it_runs_isolated_unless_told_otherwise(keras_models: Path) -> None:
    # In its own process its memory would not come back.
    assert REGISTRY.runs_isolated("tensorflow", keras_models / "saved")
