"""XGBoost models: JSON and UBJSON under any of its endings, through ``Booster.predict``.

One matrix of features in, ``predict`` out, as XGBoost's own objective shapes it: a value a row, or
a probability a class. NaN is a missing value. A file is read by ``xgboost_file`` first, since the
library crashes on broken ones. xgboost is imported by the first load.

``Booster.inplace_predict`` is safe from several threads, says its documentation, and answers as
``predict`` of a DMatrix does, without making one; linear boosters do not have it, and are asked one
request at a time. Fails with ``LoadFailed`` (FAILED_PRECONDITION) for a file that is no XGBoost
model, with INVALID_ARGUMENT for rows that do not fit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.core.errors import (
    Internal,
    InvalidArgument,
    LoadFailed,
    MeshError,
    ResourceExhausted,
)
from mesh.runtimes import tabular
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.settings import RuntimeSettings
from mesh.runtimes.xgboost_file import Malformed, check_model

PLATFORM: Final = "xgboost"
SUFFIXES: Final = (".ubj", ".json", ".bst", ".model")
OUTPUT: Final = "predict"

# Trees in memory weigh more than on disk, JSON text less; measured on digits: 0.9 to 2.1.
_CONTENT_FACTOR: Final = 2.0
_BOOSTER_BYTES: Final = 256 * 1024
# A row of zeros tells the answer's shape, unless it would itself be large.
_PROBED_FEATURES_MAX: Final = 1 << 20

_DTYPES: Final = (np.dtype(np.float32),)

Predict = Callable[[Array], Any]


class XgboostModel:
    __slots__ = ("_heap", "_names", "_output", "_predict", "_width", "metadata", "size_bytes")

    def __init__(
        self,
        predict: Predict,
        names: Sequence[str] | None,
        width: int,
        metadata: ModelMetadata,
        size_bytes: int,
        heap: NativeHeap,
    ) -> None:
        self.metadata = metadata
        self.size_bytes = size_bytes
        self._predict = predict
        self._heap = heap
        self._names = names
        self._width = width
        (self._output,) = metadata.outputs

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        matrix = tabular.number_matrix(inputs, self._names, self._width, _DTYPES)
        # A DMatrix refuses them, too; predicting in place would answer.
        if np.isinf(matrix).any():
            raise InvalidArgument("the input has infinities, or numbers too large for FP32")
        try:
            answer = self._predict(matrix)
        except MeshError:
            raise
        except MemoryError:
            raise ResourceExhausted("out of memory in predict") from None
        except Exception as error:
            raise Internal(f"XGBoost failed: {_cause(error)}") from None
        return [tabular.output_tensor(self._output, answer, len(matrix))]

    def unload(self) -> None:
        self._predict = tabular.unloaded
        self._heap.released(self.size_bytes)


class XgboostRuntime:
    model_types = ("xgboost",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(tabular.file_bytes(model_file(spec), spec))

    def load(self, spec: ModelSpec) -> XgboostModel:
        path = model_file(spec)
        content = _checked(path, spec)
        content_bytes = len(content)
        import xgboost

        xgboost.set_config(verbosity=0)
        threads = spec.options.threads or self._settings.intra_op_threads
        with self._heap.measure() as growth, tabular.loading(spec, path, "XGBoost", _cause):
            # From memory: its form is told by its first bytes, whatever the file's ending.
            booster = xgboost.Booster(params={"nthread": threads}, model_file=content)
            predict = _predict_of(booster, threads)
            found = _metadata(booster, predict)
        size_bytes = tabular.settled_bytes(
            growth.bytes_, _predicted_bytes(content_bytes), content_bytes, _BOOSTER_BYTES
        )
        names = tabular.stated_features(booster.feature_names, spec)
        width = tabular.width_of(found)
        metadata = tabular.described(found, spec)
        return XgboostModel(predict, names, width, metadata, size_bytes, self._heap)


def model_file(spec: ModelSpec) -> Path:
    """The file to load; raises LoadFailed when there is none or more than one could be meant."""
    return tabular.only_file(spec, SUFFIXES)


def _checked(path: Path, spec: ModelSpec) -> bytearray:
    """The file's content, held to be what XGBoost can be trusted with."""
    tabular.file_bytes(path, spec)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise tabular.unreadable(path, spec, error) from None
    tabular.refuse_foreign(path, content, spec, "xgboost")
    try:
        check_model(content)
    except Malformed as error:
        raise LoadFailed(
            f"model {spec.model_id!r}: {path.name} is no whole XGBoost model: {error}"
        ) from None
    return bytearray(content)


def _predict_of(booster: Any, threads: int) -> Predict:
    import json

    import xgboost

    kind = json.loads(booster.save_config())["learner"]["gradient_booster"]["name"]
    if kind == "gblinear":
        lock = threading.Lock()

        def predict(matrix: Array) -> Any:
            with lock:
                return booster.predict(
                    xgboost.DMatrix(matrix, nthread=threads), validate_features=False
                )

        return predict
    # Names and width are checked by us, where there are any.
    return lambda matrix: booster.inplace_predict(matrix, validate_features=False)


def _metadata(booster: Any, predict: Predict) -> ModelMetadata:
    """The first prediction is a slow one; here it tells what an answer looks like."""
    width = int(booster.num_features())
    shape: tuple[int, ...] = (-1, -1)
    if width <= _PROBED_FEATURES_MAX:
        answer = np.asarray(predict(np.zeros((1, width), np.float32)))
        shape = (-1, 1) if answer.ndim == 1 else (-1, *answer.shape[1:])
    return ModelMetadata(
        platform=PLATFORM,
        versions=(),
        inputs=(TensorSpec("input", "FP32", (-1, width)),),
        outputs=(TensorSpec(OUTPUT, "FP32", shape),),
        accepts_any_input=True,
    )


def _predicted_bytes(content_bytes: int) -> int:
    return round(content_bytes * _CONTENT_FACTOR) + _BOOSTER_BYTES


def _cause(error: Exception) -> str:
    """XGBoost's first line without its time and source position; the rest is a stack trace."""
    text = str(error).strip().partition("\n")[0]
    return text.rpartition("]")[2].strip()[:300].removeprefix(": ") or type(error).__name__
