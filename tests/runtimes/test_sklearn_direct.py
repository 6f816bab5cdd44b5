"""The short ways to an answer: the estimator's own to the last bit, and its own errors."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.datasets import load_iris
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import (
    ElasticNet,
    LinearRegression,
    LogisticRegression,
    Ridge,
    SGDClassifier,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from mesh.runtimes.sklearn_direct import answering

X, Y = load_iris(return_X_y=True)
TEXT = np.array(["setosa", "versicolor", "virginica"])[Y]
BOTH, FIRST = ("predict", "predict_proba"), ("predict",)

# Estimator, labels, and the methods that are answered in a shorter way.
SHORTER = {
    "logistic": (LogisticRegression(max_iter=300), Y, BOTH),
    "logistic, two classes": (LogisticRegression(max_iter=300), Y > 1, BOTH),
    "logistic, text": (LogisticRegression(max_iter=300), TEXT, BOTH),
    "sgd": (SGDClassifier(random_state=1), Y, FIRST),
    "svc, linear": (LinearSVC(), Y > 0, FIRST),
    "ridge": (Ridge(), Y, FIRST),
    "two values": (LinearRegression(), np.stack([Y, Y * 2.5], axis=1), FIRST),
    "elastic net": (ElasticNet(0.01), Y, FIRST),
    "scaled": (make_pipeline(StandardScaler(), LogisticRegression()), Y, BOTH),
    "scaled, not centred": (make_pipeline(StandardScaler(with_mean=False), Ridge()), Y, FIRST),
    "scaled forest": (make_pipeline(StandardScaler(), RandomForestClassifier(3)), Y, BOTH),
    "forest": (RandomForestClassifier(5, random_state=1), Y, BOTH),
    "forest, text": (ExtraTreesClassifier(5, random_state=1), TEXT, BOTH),
    "forest of numbers": (RandomForestRegressor(5, random_state=1), Y, FIRST),
    "extra trees of numbers": (ExtraTreesRegressor(5, random_state=1), Y, FIRST),
}


@pytest.mark.parametrize(("estimator", "labels", "methods"), SHORTER.values(), ids=SHORTER)
def test_a_shorter_way_gives_the_estimators_own_answer(
    estimator: BaseEstimator, labels: np.ndarray, methods: tuple[str, ...]
) -> None:
    estimator.fit(X, labels)
    others = np.random.default_rng(1).normal(scale=20.0, size=(64, 4))
    for name in methods:
        own, answer = getattr(estimator, name), answering(estimator, name)
        assert answer != own
        for rows in (X, X[:1], X.astype(np.float32), others, np.asfortranarray(others), X[::7]):
            before = rows.copy()
            mine, theirs = answer(rows), own(rows)
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_array_equal(mine, theirs)
            np.testing.assert_array_equal(rows, before)


WRONG = {
    "narrow": X[:2, :3],
    "flat": X[0],
    "nan": np.full((1, 4), np.nan),
    "inf": np.array([[1.0, 2.0, np.inf, 1.0]]),
    "no rows": np.empty((0, 4)),
    "beyond float32": np.array([[1e300, 1.0, 1.0, 1.0]]),
    "text": np.array([["a", "b", "c", "d"]], dtype=object),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(max_iter=300),
        RandomForestClassifier(3),
        make_pipeline(StandardScaler(), RandomForestClassifier(3)),
    ],
    ids=["linear", "forest", "pipeline"],
)
def test_what_is_wrong_with_an_input_is_said_by_the_estimator(estimator: BaseEstimator) -> None:
    estimator.fit(X, Y)
    answer = answering(estimator, "predict")
    assert answer != estimator.predict
    for what, rows in WRONG.items():
        assert outcome(answer, rows) == outcome(estimator.predict, rows), what


def outcome(answer: object, rows: np.ndarray) -> object:
    try:
        return answer(rows).tolist()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_whole_numbers_are_answered_too() -> None:
    model = Ridge().fit(X, Y)
    rows = (X[:5] * 10).astype(np.int64)
    np.testing.assert_array_equal(answering(model, "predict")(rows), model.predict(rows))


class Stern(LogisticRegression):
    def predict(self, rows: np.ndarray) -> np.ndarray:
        return np.where(self.predict_proba(rows).max(axis=1) > 0.9, super().predict(rows), -1)


class Halved(Ridge):
    def predict(self, rows: np.ndarray) -> np.ndarray:
        return super().predict(rows) / 2


@pytest.mark.parametrize(
    "estimator",
    [
        Stern(max_iter=300),
        Halved(),
        SVC(),
        RandomForestClassifier(3, n_jobs=2),
        make_pipeline(StandardScaler(), StandardScaler(), Ridge()),
    ],
    ids=["own predict", "own predict of numbers", "no way known", "by threads", "longer pipeline"],
)
def test_other_estimators_answer_themselves(estimator: BaseEstimator) -> None:
    estimator.fit(X, Y)
    assert answering(estimator, "predict") == estimator.predict


def test_a_way_that_does_not_agree_is_not_taken() -> None:
    model = LogisticRegression(max_iter=300).fit(X, Y)
    scores = model.decision_function
    # As another version of the library might: the score is computed in another way.
    model.decision_function = lambda rows: scores(rows) * (1 + 1e-15)
    assert answering(model, "predict") == model.predict


def test_an_estimator_that_was_never_fitted_answers_itself() -> None:
    model = Ridge()
    model.n_features_in_ = 4
    assert answering(model, "predict") == model.predict
