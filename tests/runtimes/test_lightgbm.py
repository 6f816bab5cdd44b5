"""LightGBM models answer as the library does, and what is wrong with a file is said."""

from __future__ import annotations

from pathlib import Path

import lightgbm
import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_iris

from mesh.core.errors import Code, InvalidArgument, LoadFailed
from mesh.runtimes.api import LoadedModel, ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.lightgbm_file import Malformed, check_model
from mesh.runtimes.registry import RuntimeRegistry

REGISTRY = RuntimeRegistry()
RUNTIME = REGISTRY.runtime_for("lightgbm")


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "model.txt is empty"),
        (b"this is no model", "does not begin as a LightGBM text"),
        (b'{"learner":{}}', "seems to be an XGBoost model; say modelFormat xgboost"),
        (b"\x80\x04abc", "seems to be a pickle"),
        (b"tree\nversion=v4\n", "the end of its trees is missing"),
    ],
)
def test_what_is_no_model_is_refused_by_what_it_is(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "model.txt").write_bytes(content)
    with pytest.raises(LoadFailed, match=words) as caught:
        load(tmp_path)
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_a_text_that_is_cut_off_in_its_trees_or_parameters_is_refused(iris) -> None:
    whole = iris[0].model_to_string().encode()
    trees = whole.index(b"end of trees")
    parameters = whole.index(b"parameters:") + 11
    for size_bytes in (*range(0, trees, trees // 100), *range(parameters, len(whole) - 18, 100)):
        with pytest.raises(Malformed):
            check_model(whole[:size_bytes])
    check_model(whole)


# Each of these ended the process, or a prediction never ended, with LightGBM 4.7.
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (b"tree_sizes", b"9", "tree 0: it|more trees"),
        (b"left_child", b"1000000", "a child is out of range"),
        (b"left_child", b"0", "a child is out of range"),
        (b"split_feature", b"4", "another feature than the 4"),
        (b"leaf_value", b"x", "leaf_value has something else than numbers"),
        (b"threshold", b"1 2", "threshold has . numbers"),
        (b"num_leaves", b"-3", "num_leaves is b'-3"),
        (b"num_class", b"0", "num_class"),
    ],
)
def test_a_tree_that_is_none_is_refused(iris, key: bytes, value: bytes, words: str) -> None:
    whole = iris[0].model_to_string().encode()
    start = whole.index(b"\n" + key + b"=") + len(key) + 2
    size_bytes = min(len(whole[start:].split(stop)[0]) for stop in (b" ", b"\n"))
    changed = whole[:start] + value + whole[start + size_bytes :]
    if key != b"tree_sizes":  # the trees must lie where the header says
        sizes = whole.index(b"tree_sizes=") + 11
        first = whole[sizes:].split(b" ")[0]
        if start > sizes:
            grown = b"%d" % (int(first) + len(value) - size_bytes)
            changed = changed[:sizes] + grown + changed[sizes + len(first) :]
    with pytest.raises(Malformed, match=words):
        check_model(changed)


@pytest.mark.parametrize(
    "parameters",
    [
        {"boosting": "dart"},
        {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5},
        {"linear_tree": True},
        {"min_data_in_leaf": 10_000},
    ],
    ids=["dart", "forest", "linear", "stump"],
)
def test_every_kind_of_tree_answers_as_the_library_does(parameters, tmp_path: Path) -> None:
    booster, x = trained(load_diabetes, objective="regression", **parameters)
    booster.save_model(tmp_path / "model.txt")
    (answer,) = load(tmp_path).infer({"x": x}, (), {})
    np.testing.assert_allclose(answer.data[:, 0], booster.predict(x), atol=1e-6)


def test_categories_and_missing_values_answer_as_the_librarys_own(tmp_path: Path) -> None:
    x, y = load_iris(return_X_y=True)
    x = np.column_stack((x[:, :2], np.arange(150) % 40))
    data = lightgbm.Dataset(x, y, categorical_feature=[2])
    booster = lightgbm.train({"verbosity": -1, "num_threads": 1}, data, 10)
    booster.save_model(tmp_path / "model.txt")
    holes = np.where(x < 3, np.nan, x)
    (answer,) = load(tmp_path).infer({"x": holes}, (), {})
    np.testing.assert_allclose(answer.data[:, 0], booster.predict(holes), atol=1e-6)


def test_no_rows_have_no_answers_of_the_right_width(iris, tmp_path: Path) -> None:
    iris[0].save_model(tmp_path / "model.txt")
    (answer,) = load(tmp_path).infer({"x": np.zeros((0, 4))}, (), {})
    assert (answer.data.shape, answer.datatype) == ((0, 3), "FP64")


def test_features_may_come_under_the_names_that_the_description_gives(iris, tmp_path: Path) -> None:
    booster, x = iris
    booster.save_model(tmp_path / "model.txt")
    stated = tuple(TensorSpec(name, "FP64", (-1, 1)) for name in "abcd")
    spec = ModelSpec("m", "lightgbm", tmp_path, options=ModelOptions("x.json", inputs=stated))
    model = REGISTRY.format_runtime("lightgbm").load(spec)
    columns = {name: x[:, "abcd".index(name)] for name in "dbca"}
    (answer,) = model.infer(columns, (), {})
    np.testing.assert_allclose(answer.data, booster.predict(x), atol=1e-6)


def test_two_files_that_could_be_meant_are_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.bst"):
        (tmp_path / name).write_text("tree\n")
    with pytest.raises(LoadFailed, match=r"found a.txt, b.bst"):
        load(tmp_path)
