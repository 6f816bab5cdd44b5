"""XGBoost models: JSON, UBJSON and the old binary form, through ``Booster.predict``.

One matrix of features in, ``predict`` out, as XGBoost's own objective shapes it: a value a row, or
a probability a class. NaN is a missing value. xgboost is imported by the first load; ``predict`` of
one booster is safe from several threads. Fails with ``LoadFailed`` (FAILED_PRECONDITION) for a file
that is no XGBoost model, with INVALID_ARGUMENT for rows that do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.core.errors import Code, Internal, LoadFailed, ResourceExhausted
from mesh.runtimes import tabular
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.settings import RuntimeSettings

PLATFORM: Final = "xgboost"
SUFFIXES: Final = (".ubj", ".json", ".bst", ".model")
OUTPUT: Final = "predict"

# Trees in memory weigh more than on disk, JSON text less; measured on digits: 0.9 to 2.1.
_CONTENT_FACTOR: Final = 2.0
_BOOSTER_BYTES: Final = 256 * 1024


class XgboostModel:
    __slots__ = ("_booster", "_heap", "_names", "_width", "metadata", "size_bytes")

    def __init__(
        self, booster: Any, metadata: ModelMetadata, size_bytes: int, heap: NativeHeap
    ) -> None:
        self.metadata = metadata
        self.size_bytes = size_bytes
        self._booster = booster
        self._heap = heap
        self._names = booster.feature_names
        self._width = int(booster.num_features())

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        matrix = tabular.number_matrix(inputs, self._names, self._width)
        try:
            # In place: no DMatrix is made. Names were checked above, where there are any.
            answer = self._booster.inplace_predict(
                np.asarray(matrix, dtype=np.float32), validate_features=False
            )
        except MemoryError:
            raise ResourceExhausted("out of memory in predict") from None
        except Exception as error:
            raise Internal(f"XGBoost failed: {tabular.one_line(error)}") from None
        return [tabular.column_tensor(OUTPUT, answer)]

    def unload(self) -> None:
        self._booster = None
        self._heap.released(self.size_bytes)


class XgboostRuntime:
    model_types = ("xgboost",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(tabular.file_bytes(_file(spec), spec))

    def load(self, spec: ModelSpec) -> XgboostModel:
        path = _file(spec)
        content_bytes = tabular.file_bytes(path, spec)
        refuse_others(path, spec)
        import xgboost

        xgboost.set_config(verbosity=0)
        threads = spec.options.threads or self._settings.intra_op_threads
        with self._heap.measure() as growth:
            try:
                booster = xgboost.Booster(params={"nthread": threads}, model_file=str(path))
                width = int(booster.num_features())
            except MemoryError:
                raise LoadFailed(
                    f"model {spec.model_id!r}: out of memory while loading {path.name}",
                    code=Code.UNAVAILABLE,
                ) from None
            except Exception as error:
                raise LoadFailed(
                    f"model {spec.model_id!r}: XGBoost cannot load {path.name}: {_cause(error)}"
                ) from None
            found = _metadata(booster, width)
        predicted = _predicted_bytes(content_bytes)
        measured = predicted if growth.bytes_ is None else growth.bytes_ + _BOOSTER_BYTES
        size_bytes = min(max(measured, content_bytes // 2 + _BOOSTER_BYTES), 2 * predicted)
        return XgboostModel(booster, tabular.described(found, spec), size_bytes, self._heap)


def _file(spec: ModelSpec) -> Path:
    if spec.options.file and not spec.path.is_file():
        return spec.path / spec.options.file
    return tabular.only_file(spec, SUFFIXES)


def refuse_others(path: Path, spec: ModelSpec) -> None:
    """XGBoost aborts or says little of text that is not its own."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"tree\n"):
        raise LoadFailed(
            f"model {spec.model_id!r}: {path.name} is a LightGBM model; register it with "
            "modelFormat lightgbm"
        )


def _metadata(booster: Any, width: int) -> ModelMetadata:
    """One row of zeros tells what an answer looks like, and is the first, slow, prediction."""
    answer = np.asarray(
        booster.inplace_predict(np.zeros((1, width), np.float32), validate_features=False)
    )
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
