"""scikit-learn models: skops files; joblib and pickle files only where the operator allows them.

Follows MLServer: an input of any name is accepted, ``predict`` answers unless ``predict_proba``
is asked for by name, and a flat answer is a column (``[n, 1]``). Several inputs are the model's
named features. scikit-learn and skops are imported by the first load.

A joblib or pickle file runs whatever code its author put in; a skops file cannot, as long as it
holds trusted types only, so untrusted ones are refused by name. Trusted are skops' own list and
the classes below, each by its full name; no package as a whole, since numpy and scikit-learn have
functions that run code, too. Fails with
``LoadFailed`` (FAILED_PRECONDITION) for a corrupt, refused or unsuitable file.
"""

from __future__ import annotations

import sys
import threading
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.core.errors import (
    Code,
    Internal,
    InvalidArgument,
    LoadFailed,
    MeshError,
    ResourceExhausted,
)
from mesh.runtimes import tabular
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.sklearn_direct import answering
from mesh.runtimes.tabular import column_tensor, feature_matrix, one_line

PLATFORM: Final = "sklearn"
SKOPS_SUFFIX: Final = ".skops"
PICKLE_SUFFIXES: Final = (".joblib", ".pickle", ".pkl")

# The first that is there is loaded; skops first, since it needs nobody's permission.
_STEM: Final = "model"
# Fitted state of common estimators that skops does not list: plain data with no code of its own.
TRUSTED_TYPES: Final = (
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    *(
        f"sklearn.neural_network._stochastic_optimizers.{name}"
        for name in ("AdamOptimizer", "SGDOptimizer")
    ),
    *(
        f"sklearn.metrics._dist_metrics.{name}Distance{bits}"
        for name in ("Euclidean", "Manhattan", "Minkowski", "Chebyshev")
        for bits in (32, 64)
    ),
    *(
        f"sklearn.neighbors.{module}.{name}{bits}"
        for module, name in (("_kd_tree", "KDTree"), ("_ball_tree", "BallTree"))
        for bits in ("", "32", "64")
    ),
    *(
        f"sklearn.gaussian_process.kernels.{name}"
        for name in (
            *("ConstantKernel", "WhiteKernel", "RBF", "Matern", "RationalQuadratic"),
            *("ExpSineSquared", "DotProduct", "Product", "Sum", "Exponentiation"),
        )
    ),
)

# Outputs in the order of preference; the first that the estimator has is the default.
_METHODS: Final = ("predict", "predict_proba", "transform")
# Python objects and their dictionaries weigh more than what they are stored as.
_CONTENT_FACTOR: Final = 1.5
_OBJECT_BYTES: Final = 128 * 1024
_importing_skops: Final = threading.Lock()


class SklearnModel:
    """One fitted estimator or pipeline. Predicting does not change it, so threads may share it."""

    __slots__ = (
        "_default",
        "_feature_names",
        "_heap",
        "_methods",
        "_stated",
        "metadata",
        "size_bytes",
    )

    def __init__(
        self,
        estimator: Any,
        feature_names: Sequence[str] | None,
        methods: Mapping[str, str],
        stated: frozenset[str],
        metadata: ModelMetadata,
        size_bytes: int,
        heap: NativeHeap,
    ) -> None:
        """``methods``: name of each output to the estimator's method that answers it. ``stated``:
        the outputs whose datatype the model's description gives."""
        self.metadata = metadata
        self.size_bytes = size_bytes
        self._heap = heap
        self._feature_names = feature_names
        # Bound once: looking up what a pipeline has costs 5 us a call.
        self._methods = {
            spec.name: (answering(estimator, methods[spec.name]), spec) for spec in metadata.outputs
        }
        self._default = (metadata.outputs[0].name,)
        self._stated = stated

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        features = feature_matrix(inputs, self._feature_names)
        answers: list[Tensor] = []
        for name in outputs or self._default:
            method, spec = self._methods[name]
            try:
                answer = method(features)
            except MeshError:
                raise
            except (ValueError, TypeError) as error:
                raise InvalidArgument(
                    f"scikit-learn refused the input: {one_line(error)}"
                ) from None
            except MemoryError as error:
                raise ResourceExhausted(f"out of memory in {name}: {one_line(error)}") from None
            except Exception as error:
                raise Internal(f"scikit-learn failed in {name}: {one_line(error)}") from None
            tensor = column_tensor(name, answer)
            if self._stated and name in self._stated:
                tensor = tabular.restated(tensor, spec)
            answers.append(tensor)
        return answers

    def unload(self) -> None:
        self._methods = {
            name: (tabular.unloaded, spec) for name, (_, spec) in self._methods.items()
        }
        self._heap.released(self.size_bytes)


class SklearnRuntime:
    """Loads ``model.skops``, or ``model.joblib|pickle|pkl`` where that is allowed."""

    model_types = ("sklearn",)

    def __init__(
        self,
        *,
        allow_pickle: bool = False,
        trusted_types: Sequence[str] = (),
        heap: NativeHeap | None = None,
        threads: int = 1,
    ) -> None:
        self._allow_pickle = allow_pickle
        self._trusted_types = (*TRUSTED_TYPES, *trusted_types)
        self._heap = heap or NativeHeap()
        self._threads = threads

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(_content_bytes(self._allowed_file(spec), spec))

    def _allowed_file(self, spec: ModelSpec) -> Path:
        """Asked before any memory is thought of: what is refused needs none."""
        path = model_file(spec)
        if path.suffix in PICKLE_SUFFIXES and not self._allow_pickle:
            raise LoadFailed(
                f"model {spec.model_id!r}: {path.name} is a pickle, which runs code when it is "
                f"loaded. Save the model with skops ({_STEM}{SKOPS_SUFFIX}), or, if you trust "
                f"everybody who can register a model, let the operator start the instance with "
                f"--allow-pickle (MESH_ALLOW_PICKLE=1), or with a ServingRuntime whose "
                f"supportedModelFormats lists pickle (--serving-runtime FILE)"
            )
        return path

    def load(self, spec: ModelSpec) -> SklearnModel:
        path = self._allowed_file(spec)
        content_bytes = _content_bytes(path, spec)
        import joblib
        import sklearn.base

        skops_io = import_skops() if path.suffix == SKOPS_SUFFIX else None
        # The protocol has no names for columns. Set here, not around each call: the filters
        # belong to the process and not to a thread.
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        with self._heap.measure() as growth:
            try:
                if skops_io is not None:
                    estimator = self._load_skops(skops_io, path, spec)
                else:
                    estimator = joblib.load(path)
            except MeshError:
                raise
            except MemoryError:
                raise LoadFailed(
                    f"model {spec.model_id!r}: out of memory while loading {path.name}",
                    code=Code.UNAVAILABLE,
                ) from None
            except Exception as error:
                # A hostile or corrupt file can raise anything at all.
                raise LoadFailed(
                    f"model {spec.model_id!r}: {path.name} cannot be loaded: "
                    f"{type(error).__name__}: {one_line(error)}"
                ) from None
        if not isinstance(estimator, sklearn.base.BaseEstimator) or not _methods(estimator):
            raise LoadFailed(
                f"model {spec.model_id!r}: {path.name} holds a {type(estimator).__name__}, "
                f"not a scikit-learn estimator with one of {', '.join(_METHODS)}"
            )
        size_bytes = tabular.settled_bytes(
            growth.bytes_, _predicted_bytes(content_bytes), content_bytes, _OBJECT_BYTES
        )
        _limit_threads(estimator, spec.options.threads or self._threads)
        found = _metadata(estimator)
        metadata = tabular.described(found, spec)
        return SklearnModel(
            estimator,
            tabular.stated_features(_feature_names(estimator), spec),
            {
                output.name: method.name
                for output, method in zip(metadata.outputs, found.outputs, strict=True)
            },
            frozenset(output.name for output in spec.options.outputs),
            metadata,
            size_bytes,
            self._heap,
        )

    def _load_skops(self, skops_io: Any, path: Path, spec: ModelSpec) -> Any:
        untrusted = set(skops_io.get_untrusted_types(file=path)) - set(self._trusted_types)
        if untrusted:
            raise LoadFailed(
                f"model {spec.model_id!r}: {path.name} holds types that are not trusted: "
                f"{', '.join(sorted(untrusted)[:10])}. Build the model of scikit-learn's own "
                f"parts, or let the operator trust them"
            )
        return skops_io.load(path, trusted=list(self._trusted_types))


def import_skops() -> Any:
    """``skops.io``, without torch: skops walks through all packages of scikit-learn for names, one
    of which imports torch where that is installed (180 MB and two seconds), and adds no name."""
    unwanted = "sklearn.externals.array_api_compat.torch"
    with _importing_skops:
        if "skops.io" in sys.modules or "torch" in sys.modules:
            import skops.io
        else:
            sys.modules[unwanted] = None  # type: ignore[assignment]
            try:
                import skops.io
            finally:
                sys.modules.pop(unwanted, None)
    return skops.io


def model_file(spec: ModelSpec) -> Path:
    """The file to load; raises LoadFailed when there is none or more than one could be meant."""
    return tabular.only_file(spec, (SKOPS_SUFFIX, *PICKLE_SUFFIXES), _STEM)


def _content_bytes(path: Path, spec: ModelSpec) -> int:
    """How large the model's content is, unpacked where it is packed."""
    try:
        if path.suffix == SKOPS_SUFFIX:
            with zipfile.ZipFile(path) as archive:
                return sum(entry.file_size for entry in archive.infolist())
        return path.stat().st_size
    except zipfile.BadZipFile as error:
        raise LoadFailed(
            f"model {spec.model_id!r}: {path.name} is no skops file: {one_line(error)}"
        ) from None
    except OSError as error:
        raise tabular.unreadable(path, spec, error) from None


def _predicted_bytes(content_bytes: int) -> int:
    return round(content_bytes * _CONTENT_FACTOR) + _OBJECT_BYTES


def _limit_threads(estimator: Any, threads: int) -> None:
    """A model that was trained with ``n_jobs=-1`` would start threads for each request. Answers
    are the same with any number of them."""
    if not hasattr(estimator, "get_params"):
        return
    stored = [name for name in estimator.get_params(deep=True) if name.split("__")[-1] == "n_jobs"]
    if stored:
        estimator.set_params(**dict.fromkeys(stored, threads))


def _feature_names(estimator: Any) -> list[str] | None:
    names = getattr(estimator, "feature_names_in_", None)
    return None if names is None else [str(name) for name in names]


def _methods(estimator: Any) -> list[str]:
    # hasattr raises in some meta-estimators that were never fitted; that is no method, either.
    found = []
    for name in _METHODS:
        try:
            if callable(getattr(estimator, name)):
                found.append(name)
        except Exception:
            continue
    return found


def _metadata(estimator: Any) -> ModelMetadata:
    columns = getattr(estimator, "n_features_in_", None)
    width = int(columns) if columns is not None else -1
    classes = getattr(estimator, "classes_", None)
    outputs: list[TensorSpec] = []
    for name in _methods(estimator):
        kind, shape = "FP64", (-1, -1)
        if name == "predict":
            shape = (-1, 1)
            if isinstance(classes, np.ndarray):
                kind = tabular.datatype_of(classes)
        elif name == "predict_proba" and isinstance(classes, np.ndarray):
            shape = (-1, len(classes))
        outputs.append(TensorSpec(name, kind, shape))
    return ModelMetadata(
        platform=PLATFORM,
        versions=(),
        inputs=(TensorSpec("predict", "FP64", (-1, width)),),
        outputs=tuple(outputs),
        accepts_any_input=True,
    )
