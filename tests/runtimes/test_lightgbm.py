"""LightGBM models answer as the library does, and what is wrong with a file is said."""

from __future__ import annotations

from pathlib import Path

import lightgbm
import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_iris

from mesh.core.errors import Code, InvalidArgument, LoadFailed
from mesh.runtimes.api import LoadedModel, ModelSpec, TensorSpec
from mesh.runtimes.registry import RuntimeRegistry

from .memory import growth_of

RUNTIME = RuntimeRegistry().runtime_for("lightgbm")


def trained(loader, **parameters: object) -> tuple[lightgbm.Booster, np.ndarray]:
    x, y = loader(return_X_y=True)
    told = {"verbosity": -1, "num_threads": 1, **parameters}
    return lightgbm.train(told, lightgbm.Dataset(x, y), 10), x


@pytest.fixture(scope="module")
def iris() -> tuple[lightgbm.Booster, np.ndarray]:
    return trained(load_iris, objective="multiclass", num_class=3)


def load(path: Path) -> LoadedModel:
    return RUNTIME.load(ModelSpec("m", "lightgbm", path))


@pytest.mark.parametrize("name", ["model.txt", "model.bst"])
def test_probabilities_equal_the_librarys_own(iris, name: str, tmp_path: Path) -> None:
    booster, x = iris
    booster.save_model(tmp_path / name)
    model = load(tmp_path)
    (answer,) = model.infer({"anything": x}, (), {})
    np.testing.assert_allclose(answer.data, booster.predict(x), atol=1e-6)
    assert model.metadata.outputs == (TensorSpec("predict", "FP64", (-1, 3)),)


def test_a_value_a_row_is_a_column(tmp_path: Path) -> None:
    booster, x = trained(load_diabetes, objective="regression")
    booster.save_model(tmp_path / "model.txt")
    (answer,) = load(tmp_path).infer({"x": x.astype(np.float32)}, (), {})
    expected = booster.predict(x.astype(np.float32)).reshape(-1, 1)
    np.testing.assert_allclose(answer.data, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"x": np.ones((2, 3))}, "rows of 4 features"),
        ({"x": np.array([[b"a"] * 4], dtype=object)}, "takes numbers"),
    ],
)
def test_rows_that_do_not_fit_are_the_clients_mistake(
    iris, wrong: dict, words: str, tmp_path: Path
) -> None:
    iris[0].save_model(tmp_path / "model.txt")
    with pytest.raises(InvalidArgument, match=words):
        load(tmp_path).infer(wrong, (), {})


def test_a_file_that_is_cut_off_or_something_else_is_refused(iris, tmp_path: Path) -> None:
    path = tmp_path / "model.txt"
    iris[0].save_model(path)
    whole = path.read_bytes()
    for content, words in (
        (whole[: len(whole) // 2], "cut off"),
        (b"this is no model", "no LightGBM text"),
        (b"", "is empty"),
        (b'{"learner":{}}', "may be an XGBoost model"),
    ):
        path.write_bytes(content)
        with pytest.raises(LoadFailed, match=words) as caught:
            load(tmp_path)
        assert caught.value.code is Code.FAILED_PRECONDITION


def test_its_memory_comes_back(iris, tmp_path: Path) -> None:
    iris[0].save_model(tmp_path / "model.txt")
    assert growth_of("lightgbm", tmp_path / "model.txt", iris[1][:4], tmp_path) < 1.1
