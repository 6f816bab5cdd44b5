"""XGBoost models answer as the library does, and what is wrong with a file is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xgboost
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from mesh.core.errors import Code, InvalidArgument, LoadFailed
from mesh.runtimes.api import LoadedModel, ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.registry import RuntimeRegistry

from .memory import growth_of

REGISTRY = RuntimeRegistry()
RUNTIME = REGISTRY.runtime_for("xgboost")


def trained(loader, objective: str, **more: object) -> tuple[xgboost.Booster, np.ndarray]:
    x, y = loader(return_X_y=True)
    parameters = {"objective": objective, "max_depth": 3, "nthread": 1, **more}
    return xgboost.train(parameters, xgboost.DMatrix(x, y), 5), x


@pytest.fixture(scope="module")
def digits() -> tuple[xgboost.Booster, np.ndarray]:
    return trained(load_digits, "multi:softprob", num_class=10)


def load(path: Path) -> LoadedModel:
    return RUNTIME.load(ModelSpec("m", "xgboost", path))


@pytest.mark.parametrize("ending", ["json", "ubj"])
def test_probabilities_equal_the_librarys_own(digits, ending: str, tmp_path: Path) -> None:
    booster, x = digits
    booster.save_model(tmp_path / f"model.{ending}")
    model = load(tmp_path)
    (answer,) = model.infer({"anything": x}, (), {})
    np.testing.assert_allclose(answer.data, booster.predict(xgboost.DMatrix(x)), atol=1e-6)
    assert (answer.name, answer.datatype) == ("predict", "FP32")
    assert model.metadata.inputs == (TensorSpec("input", "FP32", (-1, 64)),)
    assert model.metadata.outputs == (TensorSpec("predict", "FP32", (-1, 10)),)


@pytest.mark.parametrize(
    ("loader", "objective"),
    [(load_diabetes, "reg:squarederror"), (load_breast_cancer, "binary:logistic")],
    ids=["regression", "two classes"],
)
def test_a_value_a_row_is_a_column(loader, objective: str, tmp_path: Path) -> None:
    booster, x = trained(loader, objective)
    booster.save_model(tmp_path / "model.json")
    (answer,) = load(tmp_path).infer({"x": x.astype(np.float32)}, (), {})
    expected = booster.predict(xgboost.DMatrix(x))
    np.testing.assert_allclose(answer.data, expected.reshape(-1, 1), atol=1e-6)


def test_nan_is_a_missing_value(digits, tmp_path: Path) -> None:
    booster, x = digits
    booster.save_model(tmp_path / "model.json")
    holes = np.where(x[:5] > 8, np.nan, x[:5])
    (answer,) = load(tmp_path).infer({"x": holes}, (), {})
    np.testing.assert_allclose(answer.data, booster.predict(xgboost.DMatrix(holes)), atol=1e-6)


def test_named_features_may_come_as_inputs(tmp_path: Path) -> None:
    x, y = load_diabetes(return_X_y=True)
    names = [f"f{index}" for index in range(10)]
    booster = xgboost.train({}, xgboost.DMatrix(x, y, feature_names=names), 3)
    booster.save_model(tmp_path / "model.ubj")
    columns = {name: x[:, index] for index, name in reversed(list(enumerate(names)))}
    (answer,) = load(tmp_path).infer(columns, (), {})
    expected = booster.predict(xgboost.DMatrix(x, feature_names=names))
    np.testing.assert_allclose(answer.data[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"x": np.ones((2, 63))}, "rows of 64 features"),
        ({"x": np.array([[b"a"] * 64], dtype=object)}, "takes numbers"),
        ({"a": np.ones(2), "b": np.ones(2)}, "takes one input"),
    ],
)
def test_rows_that_do_not_fit_are_the_clients_mistake(
    digits, wrong: dict, words: str, tmp_path: Path
) -> None:
    digits[0].save_model(tmp_path / "model.json")
    with pytest.raises(InvalidArgument, match=words):
        load(tmp_path).infer(wrong, (), {})


def test_a_description_that_contradicts_the_model_is_refused(digits, tmp_path: Path) -> None:
    digits[0].save_model(tmp_path / "model.json")
    options = ModelOptions("config.pbtxt", inputs=(TensorSpec("x", "FP32", (-1, 7)),))
    with pytest.raises(LoadFailed, match=r"config.pbtxt says .* 7 features; the model has 64"):
        REGISTRY.format_runtime("xgboost").load(
            ModelSpec("m", "xgboost", tmp_path, options=options)
        )


def test_a_file_that_is_cut_off_or_something_else_is_refused(digits, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    digits[0].save_model(path)
    whole = path.read_bytes()
    for content, words in (
        (whole[: len(whole) // 2], "XGBoost cannot load model.json"),
        (b"this is no model", "XGBoost cannot load model.json"),
        (b"", "model.json is empty"),
        (b"tree\nversion=v4\n", "is a LightGBM model"),
    ):
        path.write_bytes(content)
        with pytest.raises(LoadFailed, match=words) as caught:
            load(tmp_path)
        assert caught.value.code is Code.FAILED_PRECONDITION


def test_two_files_that_could_be_meant_are_named(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(LoadFailed, match=r"found a.json, b.json"):
        load(tmp_path)


def test_its_memory_comes_back(digits, tmp_path: Path) -> None:
    digits[0].save_model(tmp_path / "model.ubj")
    assert growth_of("xgboost", tmp_path / "model.ubj", digits[1][:4], tmp_path) < 1.1
