"""Answers of common estimators without what scikit-learn looks up about each input first.

For one row a linear model's own ``predict`` spends nearly all of its time (some 200 us) on finding
out what kind of array it was given, and a forest's on setting up its joblib loop (9 ms for 100
trees). What is computed here is what scikit-learn computes, operation for operation, on what it
would let pass: finite floats of the right shape. Everything else goes to the estimator's own
method, which says what is wrong. A way is taken only where it has answered made-up rows exactly as
the estimator did, bit for bit, when the model was loaded: another version of scikit-learn that
computes otherwise costs the gain and nothing else.

Pure but for the estimator, which is not changed; threads may share what is returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from mesh.runtimes.api import Array

Answer = Callable[[Array], Any]

_FLOATS: Final = frozenset((np.dtype(np.float64), np.dtype(np.float32)))
# What is compared is what is done, not what a kernel makes of it: few rows tell as much as many.
_PROOF_ROWS: Final = 2


def answering(estimator: Any, method_name: str) -> Answer:
    """The estimator's method of this name, or what answers as it does in less time."""
    method: Answer = getattr(estimator, method_name)
    width = getattr(estimator, "n_features_in_", None)
    if not isinstance(width, int) or width < 1:
        return method
    try:
        quick = _way(estimator, method_name)
        if quick is None or not _same(quick, method, width):
            return method
    except Exception:  # attributes that another version has not, or an estimator never fitted
        return method
    return _guarded(quick, method, width)


def _guarded(quick: Answer, method: Answer, width: int) -> Answer:
    isfinite, floats = np.isfinite, _FLOATS

    def answer(features: Array) -> Any:
        shape = features.shape
        if (
            len(shape) == 2
            and shape[1] == width
            and shape[0]
            and features.dtype in floats
            and isfinite(features).all()
        ):
            found = quick(features)
            if found is not None:
                return found
        return method(features)

    return answer


def _same(quick: Answer, method: Answer, width: int) -> bool:
    """To the last bit, of made-up rows. Classes alone would not tell: steps of a way whose result
    is a choice are compared one by one where they are made."""
    drawn = np.random.default_rng(width).normal(scale=3.0, size=(_PROOF_ROWS, width))
    for features in (drawn, drawn.astype(np.float32)):
        mine, theirs = quick(features), method(features)
        if (
            type(mine) is not type(theirs)
            or (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape)
            or mine.tolist() != theirs.tolist()
        ):
            return False
    return True


# ---- ways: None for an input that they leave to the estimator's own method ----------------------


def _way(estimator: Any, method_name: str) -> Answer | None:
    from sklearn.pipeline import Pipeline

    if type(estimator) is Pipeline:
        return _pipeline(estimator, method_name)
    if method_name not in ("predict", "predict_proba"):
        return None
    return _linear(estimator, method_name) or _forest(estimator, method_name)


def _pipeline(pipeline: Any, method_name: str) -> Answer | None:
    """A linear model or a forest behind a standard scaler: what most pipelines are."""
    from sklearn.preprocessing import StandardScaler

    steps = [step for _, step in pipeline.steps if step is not None and step != "passthrough"]
    if len(steps) != 2 or type(steps[0]) is not StandardScaler or pipeline.memory is not None:
        return None
    last = _way(steps[1], method_name)
    if last is None:
        return None
    scale = _scaler(steps[0])
    if scale is None:
        return None
    answer: Answer = last
    isfinite = np.isfinite

    def scaled(features: Array) -> Any:
        features = scale(features)
        return answer(features) if isfinite(features).all() else None

    return scaled


def _scaler(scaler: Any) -> Answer | None:
    """scikit-learn takes the factors in the input's own precision."""
    factors = {
        dtype: (
            scaler.mean_.astype(dtype) if scaler.with_mean else None,
            scaler.scale_.astype(dtype) if scaler.with_std else None,
        )
        for dtype in _FLOATS
    }

    def scale(features: Array) -> Array:
        mean, deviation = factors[features.dtype]
        features = features.copy(order="K")
        if mean is not None:
            features -= mean
        if deviation is not None:
            features /= deviation
        return features

    return scale if _same(scale, scaler.transform, scaler.n_features_in_) else None


def _linear(estimator: Any, method_name: str) -> Answer | None:
    """Classifiers by the sign or the largest of their scores, their shares where they are a
    logistic regression's, and regressors."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.linear_model._base import LinearClassifierMixin, LinearModel

    kind = type(estimator)
    if not isinstance(estimator, LinearClassifierMixin):
        if method_name != "predict" or not isinstance(estimator, LinearModel):
            return None
        if not all(_of_library(step) for step in (kind.predict, kind._decision_function)):
            return None
        return _linear_values(estimator.coef_, estimator.intercept_)
    if kind.decision_function is not LinearClassifierMixin.decision_function:
        return None
    coef = estimator.coef_
    if type(coef) is not np.ndarray or coef.ndim != 2:  # a sparse one
        return None
    scores = _scores(coef, estimator.intercept_)
    if not _same(scores, estimator.decision_function, estimator.n_features_in_):
        return None
    if method_name == "predict" and kind.predict is LinearClassifierMixin.predict:
        return _chosen(scores, estimator.classes_)
    if method_name == "predict_proba" and kind in (LogisticRegression, LogisticRegressionCV):
        return _one_or_other(scores) if len(coef) == 1 else _softmax(scores)
    return None


def _of_library(function: Any) -> bool:
    """And not of a class derived from one of its own."""
    return str(function.__module__).startswith("sklearn.linear_model.")


def _scores(coef: Array, intercept: Any) -> Answer:
    """One a row where there are two classes."""
    columns = coef.T
    if len(coef) == 1:
        return lambda features: (features @ columns + intercept).reshape(-1)
    return lambda features: features @ columns + intercept


def _chosen(scores: Answer, classes: Array) -> Answer:
    def chosen(features: Array) -> Any:
        found = scores(features)
        if found.ndim == 1:
            return classes.take((found > 0).astype(np.intp))
        return classes.take(found.argmax(axis=1))

    return chosen


def _one_or_other(scores: Answer) -> Answer:
    from scipy.special import expit

    def shares(features: Array) -> Array:
        second: Array = expit(scores(features))
        return np.stack([1 - second, second], axis=1)

    return shares


def _softmax(scores: Answer) -> Answer:
    def shares(features: Array) -> Array:
        found: Array = scores(features)
        found -= found.max(axis=1).reshape(-1, 1)
        np.exp(found, out=found)
        found /= found.sum(axis=1).reshape(-1, 1)
        return found

    return shares


def _linear_values(coef: Array, intercept: Any) -> Answer | None:
    if type(coef) is not np.ndarray:
        return None
    columns = coef if coef.ndim == 1 else coef.T
    return lambda features: features @ columns + intercept


def _forest(estimator: Any, method_name: str) -> Answer | None:
    """The mean of the trees' leaves, tree by tree; by scikit-learn where it is to use threads."""
    from sklearn.ensemble import (
        ExtraTreesClassifier,
        ExtraTreesRegressor,
        RandomForestClassifier,
        RandomForestRegressor,
    )

    kind = type(estimator)
    classifies = kind in (RandomForestClassifier, ExtraTreesClassifier)
    if not classifies and kind not in (RandomForestRegressor, ExtraTreesRegressor):
        return None
    if estimator.n_outputs_ != 1 or estimator.n_jobs not in (None, 1) or estimator.verbose:
        return None
    leaves = [tree.tree_.predict for tree in estimator.estimators_]
    if not classifies:
        return _mean_of_leaves(leaves, None)
    shares = _mean_of_leaves(leaves, estimator.n_classes_)
    if method_name == "predict_proba":
        return shares
    classes = estimator.classes_

    def largest(features: Array) -> Any:
        found = shares(features)
        return None if found is None else classes.take(found.argmax(axis=1), axis=0)

    return largest


def _mean_of_leaves(leaves: list[Answer], classes: int | None) -> Answer:
    """``classes`` None: one value a row."""
    isfinite = np.isfinite

    def mean(features: Array) -> Any:
        if features.dtype != np.float32:
            with np.errstate(over="ignore"):
                features = features.astype(np.float32)
            if not isfinite(features).all():
                return None
        features = np.ascontiguousarray(features)
        rows = len(features)
        total = np.zeros(rows if classes is None else (rows, classes))
        for leaf in leaves:
            found = leaf(features)
            total += found[:, 0] if classes is None else found[:, :classes]
        total /= len(leaves)
        return total

    return mean
