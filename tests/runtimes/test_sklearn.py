"""scikit-learn models: skops by default, pickles by permission, MLServer's manners."""

from __future__ import annotations

from pathlib import Path

import joblib
import numpy as np
import numpy.testing
import pytest
import skops.io
from sklearn.datasets import load_diabetes, load_iris
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from mesh.core.errors import Code, InvalidArgument, LoadFailed
from mesh.runtimes.api import ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.sklearn import SklearnRuntime, _limit_threads

from .models import spec

X, Y = load_iris(return_X_y=True)
RUNTIME = SklearnRuntime()


@pytest.fixture(scope="module")
def iris() -> LogisticRegression:
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)


@pytest.fixture
def skops_file(iris: LogisticRegression, tmp_path: Path) -> Path:
    skops.io.dump(iris, tmp_path / "model.skops")
    return tmp_path / "model.skops"


def load(path: Path, **settings: object):
    return SklearnRuntime(**settings).load(spec(path, "sklearn"))


def test_metadata(skops_file: Path) -> None:
    metadata = load(skops_file.parent).metadata
    assert metadata.platform == "sklearn"
    assert metadata.accepts_any_input
    assert metadata.inputs == (TensorSpec("predict", "FP64", (-1, 4)),)
    assert metadata.outputs == (
        TensorSpec("predict", "INT64", (-1, 1)),
        TensorSpec("predict_proba", "FP64", (-1, 3)),
    )


def test_predict_is_the_default_and_probabilities_come_when_asked(
    skops_file: Path, iris: LogisticRegression
) -> None:
    model = load(skops_file)
    (answer,) = model.infer({"anything": X.astype(np.float32)}, (), {})
    assert (answer.name, answer.datatype, answer.data.shape) == ("predict", "INT64", (150, 1))
    np.testing.assert_array_equal(answer.data[:, 0], iris.predict(X))
    proba, label = model.infer({"x": X}, ("predict_proba", "predict"), {})
    np.testing.assert_allclose(proba.data, iris.predict_proba(X))
    assert (label.name, proba.datatype) == ("predict", "FP64")


def test_text_labels_are_bytes(tmp_path: Path) -> None:
    names = np.array(["setosa", "versicolor", "virginica"])[Y]
    skops.io.dump(LogisticRegression(max_iter=500).fit(X, names), tmp_path / "model.skops")
    model = load(tmp_path)
    assert model.metadata.outputs[0].datatype == "BYTES"
    assert model.infer({"x": X[:1]}, (), {})[0].data.tolist() == [[b"setosa"]]


def test_named_features_may_come_as_inputs(tmp_path: Path) -> None:
    ridge = Ridge().fit(X, Y)
    ridge.feature_names_in_ = np.array(["a", "b", "c", "d"], dtype=object)
    skops.io.dump(ridge, tmp_path / "model.skops")
    model = load(tmp_path)
    columns = {name: X[:5, index] for index, name in enumerate("abcd")}
    shuffled = {name: columns[name] for name in "dbca"}
    (answer,) = model.infer(shuffled, (), {})
    np.testing.assert_allclose(answer.data[:, 0], ridge.predict(X[:5]))
    with pytest.raises(InvalidArgument, match=r"features \['a', 'b', 'c', 'd'\].*\['a', 'b'\]"):
        model.infer({"a": X[:, 0], "b": X[:, 1]}, (), {})
    with pytest.raises(InvalidArgument, match="equally many rows"):
        model.infer({**columns, "a": X[:2, 0]}, (), {})


def test_a_wrong_input_is_the_clients_fault(skops_file: Path) -> None:
    model = load(skops_file)
    with pytest.raises(InvalidArgument, match=r"3 features.*expecting 4"):
        model.infer({"x": X[:, :3]}, (), {})
    with pytest.raises(InvalidArgument, match="takes one input"):
        model.infer({"x": X, "y": X}, (), {})
    with pytest.raises(InvalidArgument, match="NaN"):
        model.infer({"x": np.full((1, 4), np.nan)}, (), {})


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(3),
        HistGradientBoostingClassifier(max_iter=2),
        KNeighborsClassifier(),
        MLPClassifier((4,), max_iter=200, solver="lbfgs"),
        MLPClassifier((4,), max_iter=400, tol=1e-2),
    ],
    ids=["forest", "boosting", "neighbors", "mlp-lbfgs", "mlp-adam"],
)
def test_common_estimators_are_trusted(estimator: LogisticRegression, tmp_path: Path) -> None:
    estimator.fit(X, Y)
    skops.io.dump(estimator, tmp_path / "model.skops")
    (answer,) = load(tmp_path).infer({"x": X}, (), {})
    np.testing.assert_array_equal(answer.data[:, 0], estimator.predict(X))


class TestTrust:
    def evil(self, tmp_path: Path) -> Path:
        # A function of numpy's that executes the text that it is given.
        model = make_pipeline(FunctionTransformer(numpy.testing.rundocs), Ridge())
        model.steps[1][1].fit(X, Y)
        skops.io.dump(model, tmp_path / "model.skops")
        return tmp_path

    def test_an_untrusted_type_is_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(LoadFailed, match=r"not trusted: numpy\.testing.*rundocs") as caught:
            load(self.evil(tmp_path))
        assert caught.value.code is Code.FAILED_PRECONDITION

    def test_the_operator_may_trust_it(self, tmp_path: Path) -> None:
        path = self.evil(tmp_path)
        name = f"{numpy.testing.rundocs.__module__}.rundocs"
        assert load(path, trusted_types=(name,)).metadata.outputs


class Boom:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("boom-was-here"),))


class TestPickles:
    @pytest.mark.parametrize("suffix", [".joblib", ".pickle", ".pkl"])
    def test_refused_naming_the_setting_and_nothing_is_run(
        self, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        joblib.dump(Boom(), tmp_path / f"model{suffix}")
        with pytest.raises(LoadFailed, match=r"--allow-pickle.*MESH_ALLOW_PICKLE") as caught:
            load(tmp_path)
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert not (tmp_path / "boom-was-here").exists()

    @pytest.mark.parametrize("suffix", [".joblib", ".pickle", ".pkl"])
    def test_loaded_where_allowed(
        self, suffix: str, iris: LogisticRegression, tmp_path: Path
    ) -> None:
        joblib.dump(iris, tmp_path / f"model{suffix}")
        (answer,) = load(tmp_path, allow_pickle=True).infer({"x": X}, (), {})
        np.testing.assert_array_equal(answer.data[:, 0], iris.predict(X))

    def test_something_else_in_it_is_refused(self, tmp_path: Path) -> None:
        joblib.dump({"not": "a model"}, tmp_path / "model.joblib")
        with pytest.raises(LoadFailed, match="holds a dict, not a scikit-learn estimator"):
            load(tmp_path, allow_pickle=True)

    def test_skops_wins_over_a_pickle_beside_it(self, skops_file: Path) -> None:
        joblib.dump(Boom(), skops_file.parent / "model.pkl")
        load(skops_file.parent)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("name", ["model.skops", "model.joblib"])
def test_a_corrupt_file_says_why(name: str, allow_pickle: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(LoadFailed, match=f"'the-model'.*{name}") as caught:
        load(tmp_path, allow_pickle=allow_pickle)
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_missing_and_ambiguous_files(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="found none"):
        load(tmp_path)
    for name in ("a.skops", "b.skops"):
        (tmp_path / name).touch()
    with pytest.raises(LoadFailed, match=r"a\.skops, b\.skops"):
        load(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(LoadFailed, match="none of the suffixes"):
        load(tmp_path / "x.txt")


def test_size_covers_the_content(skops_file: Path) -> None:
    model = load(skops_file)
    assert 0 < model.size_bytes <= 2 * RUNTIME.predict_size_bytes(spec(skops_file, "sklearn"))


def described(path: Path, options: ModelOptions):
    return RUNTIME.load(ModelSpec("m", "sklearn", path, options=options))


def test_what_the_description_says_is_advertised_and_answered(skops_file: Path) -> None:
    options = ModelOptions(
        "model-settings.json",
        inputs=(TensorSpec("flower", "FP32", (-1, 4)),),
        outputs=(TensorSpec("species", "FP32", (-1, 1)),),
    )
    model = described(skops_file, options)
    assert model.metadata.inputs == options.inputs
    assert [output.name for output in model.metadata.outputs] == ["species", "predict_proba"]
    (answer,) = model.infer({"flower": X[:2]}, (), {})
    assert (answer.name, answer.datatype, answer.data.dtype) == ("species", "FP32", np.float32)


def test_a_description_of_another_width_is_refused(skops_file: Path) -> None:
    options = ModelOptions("config.pbtxt", inputs=(TensorSpec("x", "FP32", (-1, 5)),))
    with pytest.raises(LoadFailed, match=r"config.pbtxt says .* 5 features; the model has 4"):
        described(skops_file, options)


def test_stored_n_jobs_give_way_to_the_threads_that_are_set(tmp_path: Path) -> None:
    forest = RandomForestClassifier(3, n_jobs=-1).fit(X, Y)
    pipeline = make_pipeline(StandardScaler(), forest)
    _limit_threads(pipeline, 2)
    assert forest.n_jobs == 2


def test_regression_answers_as_the_library_does(tmp_path: Path) -> None:
    x, y = load_diabetes(return_X_y=True)
    ridge = Ridge().fit(x, y)
    skops.io.dump(ridge, tmp_path / "model.skops")
    (answer,) = load(tmp_path).infer({"x": x}, (), {})
    np.testing.assert_allclose(answer.data[:, 0], ridge.predict(x), atol=1e-6)


def test_text_where_numbers_are_wanted_is_the_clients_fault(skops_file: Path) -> None:
    with pytest.raises(InvalidArgument, match="could not convert string to float"):
        load(skops_file).infer({"x": np.array([[b"a", b"b", b"c", b"d"]], dtype=object)}, (), {})


@pytest.mark.parametrize("name", ["model.skops", "model.joblib"])
def test_a_cut_off_or_empty_file_is_refused(
    name: str, iris: LogisticRegression, tmp_path: Path
) -> None:
    path = tmp_path / name
    (skops.io.dump if name.endswith("skops") else joblib.dump)(iris, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(LoadFailed, match=name):
            load(tmp_path, allow_pickle=True)


def test_the_refusal_of_a_pickle_names_both_ways_to_allow_it(tmp_path: Path) -> None:
    joblib.dump(Ridge(), tmp_path / "model.joblib")
    with pytest.raises(LoadFailed) as caught:
        load(tmp_path)
    for words in ("--allow-pickle", "MESH_ALLOW_PICKLE=1", "supportedModelFormats lists pickle"):
        assert words in caught.value.message
