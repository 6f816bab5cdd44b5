"""LiteRT models answer as Keras does, and what is wrong with a file is said."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris

from mesh.core.errors import LoadFailed
from mesh.runtimes.api import ModelSpec
from mesh.runtimes.registry import RuntimeRegistry

from .memory import growth_of

X = load_iris().data.astype(np.float32)
RUNTIME = RuntimeRegistry().format_runtime("tflite")


def load(path: Path):
    return RUNTIME.load(ModelSpec("m", "tflite", path))


def test_answers_equal_those_of_the_model_that_it_was_made_of(keras_models: Path) -> None:
    model = load(keras_models / "model.tflite")
    (one,) = model.metadata.inputs
    assert (one.datatype, one.shape) == ("FP32", (-1, 4))
    expected = np.load(keras_models / "expected.npy")
    for rows in (150, 1, 7):  # each resizes the input
        (answer,) = model.infer({one.name: X[:rows]}, (), {})
        np.testing.assert_allclose(answer.data, expected[:rows], atol=1e-6)


def test_threads_do_not_disturb_one_another(keras_models: Path) -> None:
    model = load(keras_models / "model.tflite")
    name, expected = model.metadata.inputs[0].name, np.load(keras_models / "expected.npy")

    def ask(row: int) -> np.ndarray:
        return model.infer({name: X[row : row + 3]}, (), {})[0].data

    with ThreadPoolExecutor(8) as pool:
        for row, answer in enumerate(pool.map(ask, range(100))):
            np.testing.assert_allclose(answer, expected[row : row + 3], atol=1e-6)


def test_a_file_that_is_cut_off_or_something_else_is_refused(
    keras_models: Path, tmp_path: Path
) -> None:
    whole = (keras_models / "model.tflite").read_bytes()
    path = tmp_path / "model.tflite"
    for content, words in (
        (whole[:100], "cannot load"),
        (b"this is no model", "no LiteRT model"),
        (b"", "is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(LoadFailed, match=words):
            load(tmp_path)


def test_its_memory_comes_back(keras_models: Path, tmp_path: Path) -> None:
    assert growth_of("tflite", keras_models / "model.tflite", X[:4], tmp_path) < 1.1
