"""XGBoost models answer as the library does, and what is wrong with a file is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xgboost
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from mesh.core.errors import Code, InvalidArgument, LoadFailed
from mesh.runtimes.api import LoadedModel, ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.registry import RuntimeRegistry
from mesh.runtimes.xgboost_file import Malformed, check_model

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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "model.json is empty"),
        (b"this is no model", "neither JSON nor UBJSON"),
        (b"tree\nversion=v4\n", "seems to be a LightGBM text; say modelFormat lightgbm"),
        (b"binf" + bytes(100), "binary form of XGBoost before 3.*save_model"),
        (b"PK\x03\x04" + bytes(100), "seems to be a zip archive"),
        (b'{"learner": 3}', "the model has no learner"),
        (b'{"a": [1, 2', "the file seems to be cut off"),
    ],
)
def test_what_is_no_model_is_refused_by_what_it_is(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(LoadFailed, match=words) as caught:
        load(tmp_path)
    assert caught.value.code is Code.FAILED_PRECONDITION


@pytest.mark.parametrize("ending", ["json", "ubj"])
def test_a_file_that_is_cut_off_anywhere_is_refused(digits, ending: str) -> None:
    whole = bytes(digits[0].save_raw(ending))
    for size_bytes in range(2, len(whole), len(whole) // 200):
        with pytest.raises(Malformed):
            check_model(whole[:size_bytes])
    check_model(whole)


# Each of these ended in a segmentation fault of XGBoost 3.2, at load or at the first prediction.
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("left_children", 1 << 20, "tree 1: a child is out of range"),
        ("left_children", 2, "tree 1: a node is the child of two nodes"),
        ("split_indices", 64, "tree 1: a split uses another feature than the 64"),
        ("parents", -7, "tree 1: a node's parent is out of range"),
        ("id", 9_999, "the ids of its trees"),
        ("size_leaf_vector", "7", "size_leaf_vector is 7"),
        ("num_nodes", "3", "it has 3 nodes"),
    ],
)
def test_a_tree_that_is_none_is_refused(digits, key: str, value: object, words: str) -> None:
    model = json.loads(bytes(digits[0].save_raw("json")))
    tree = model["learner"]["gradient_booster"]["model"]["trees"][1]
    if key in tree["tree_param"]:
        tree["tree_param"][key] = value
    elif isinstance(tree[key], list):
        tree[key][0] = value
    else:
        tree[key] = value
    with pytest.raises(Malformed, match=words):
        check_model(json.dumps(model).encode())


@pytest.mark.parametrize("booster", ["gbtree", "dart", "gblinear"])
def test_every_booster_answers_as_the_library_does(booster: str, tmp_path: Path) -> None:
    trained_one, x = trained(load_diabetes, "reg:squarederror", booster=booster)
    trained_one.save_model(tmp_path / "model.ubj")
    (answer,) = load(tmp_path).infer({"x": x[:20]}, (), {})
    expected = trained_one.predict(xgboost.DMatrix(x[:20]))
    np.testing.assert_allclose(answer.data[:, 0], expected, rtol=1e-6)


def test_categories_and_vector_leaves_answer_as_the_librarys_own(tmp_path: Path) -> None:
    x, y = load_digits(return_X_y=True)
    x = x[:, :5].astype(int)
    matrix = xgboost.DMatrix(x, y, feature_types=["c"] * 5, enable_categorical=True)
    categorical = xgboost.train({"nthread": 1, "max_cat_to_onehot": 2}, matrix, 3)
    both = np.column_stack((y, -y))
    vector = xgboost.train(
        {"nthread": 1, "multi_strategy": "multi_output_tree"}, xgboost.DMatrix(x, both), 3
    )
    for booster, data in ((categorical, matrix), (vector, xgboost.DMatrix(x))):
        booster.save_model(tmp_path / "model.bst")
        (answer,) = load(tmp_path).infer({"x": x}, (), {})
        expected = booster.predict(data).reshape(len(x), -1)
        np.testing.assert_allclose(answer.data, expected, rtol=1e-6)


def test_infinities_are_refused_as_a_dmatrix_refuses_them(digits, tmp_path: Path) -> None:
    digits[0].save_model(tmp_path / "model.ubj")
    model = load(tmp_path)
    for value in (np.inf, 1e300):
        with pytest.raises(InvalidArgument, match="infinities"):
            model.infer({"x": np.full((1, 64), value)}, (), {})


def test_no_rows_have_no_answers_of_the_right_width(digits, tmp_path: Path) -> None:
    digits[0].save_model(tmp_path / "model.ubj")
    (answer,) = load(tmp_path).infer({"x": np.zeros((0, 64))}, (), {})
    assert (answer.data.shape, answer.datatype) == ((0, 10), "FP32")


def test_what_the_description_says_is_advertised_and_answered(digits, tmp_path: Path) -> None:
    digits[0].save_model(tmp_path / "model.ubj")
    options = ModelOptions(
        "config.pbtxt",
        inputs=(TensorSpec("pixels", "FP64", (-1, 64)),),
        outputs=(TensorSpec("scores", "FP64", (-1, 10)),),
    )
    model = REGISTRY.format_runtime("xgboost").load(
        ModelSpec("m", "xgboost", tmp_path, options=options)
    )
    assert (model.metadata.inputs, model.metadata.outputs) == (options.inputs, options.outputs)
    (answer,) = model.infer({"pixels": digits[1][:2]}, (), {})
    assert (answer.name, answer.datatype, answer.data.dtype) == ("scores", "FP64", np.float64)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ((TensorSpec("y", "FP32", (-1, 3)),), r"shape \[-1, 3\]; the model answers \[-1, 10\]"),
        ((TensorSpec("y", "BYTES", (-1, 10)),), "is BYTES; the model answers FP32"),
        (
            (TensorSpec("y", "FP32", (-1,)), TensorSpec("z", "FP32", (-1,))),
            "names the outputs y, z",
        ),
    ],
)
def test_described_outputs_that_it_does_not_have_are_refused(
    digits, outputs: tuple[TensorSpec, ...], words: str, tmp_path: Path
) -> None:
    digits[0].save_model(tmp_path / "model.ubj")
    options = ModelOptions("config.pbtxt", outputs=outputs)
    with pytest.raises(LoadFailed, match=words):
        REGISTRY.format_runtime("xgboost").load(
            ModelSpec("m", "xgboost", tmp_path, options=options)
        )


def test_two_files_that_could_be_meant_are_named(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(LoadFailed, match=r"found a.json, b.json"):
        load(tmp_path)
