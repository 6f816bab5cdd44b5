"""LightGBM models: its text form (``.txt``, ``.bst``), through ``Booster.predict``.

One matrix of features in, ``predict`` out, as LightGBM's objective shapes it: a value a row, or a
probability a class. NaN is a missing value. A file is read by ``lightgbm_file`` first, since the
library crashes on broken ones. lightgbm is imported by the first load; several threads may predict
with one booster, which the library guards by a lock that readers share. Fails with ``LoadFailed``
(FAILED_PRECONDITION) for a file that is no LightGBM model, with INVALID_ARGUMENT for rows that do
not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.core.errors import Internal, LoadFailed, MeshError, ResourceExhausted
from mesh.runtimes import tabular
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.lightgbm_file import Malformed, check_model
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.settings import RuntimeSettings

PLATFORM: Final = "lightgbm"
SUFFIXES: Final = (".txt", ".bst")
OUTPUT: Final = "predict"

# The text is kept beside the trees that are made of it.
_CONTENT_FACTOR: Final = 2.0
_BOOSTER_BYTES: Final = 256 * 1024
# What the library reads without a copy.
_DTYPES: Final = (np.dtype(np.float64), np.dtype(np.float32))
# A row of zeros tells the answer's shape, unless it would itself be large.
_PROBED_FEATURES_MAX: Final = 1 << 20

Predict = Callable[[Array], Any]


class LightgbmModel:
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
        if not len(matrix):  # the library divides by the number of rows
            return [tabular.output_tensor(self._output, None, 0)]
        try:
            answer = self._predict(matrix)
        except MeshError:
            raise
        except MemoryError:
            raise ResourceExhausted("out of memory in predict") from None
        except Exception as error:
            raise Internal(f"LightGBM failed: {tabular.one_line(error)}") from None
        return [tabular.output_tensor(self._output, answer, len(matrix))]

    def unload(self) -> None:
        self._predict = tabular.unloaded
        self._heap.released(self.size_bytes)


class LightgbmRuntime:
    model_types = ("lightgbm",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(tabular.file_bytes(model_file(spec), spec))

    def load(self, spec: ModelSpec) -> LightgbmModel:
        path = model_file(spec)
        text = _checked(path, spec)
        content_bytes = len(text)
        import lightgbm

        threads = spec.options.threads or self._settings.intra_op_threads
        with self._heap.measure() as growth, tabular.loading(spec, path, "LightGBM"):
            booster = lightgbm.Booster(model_str=text)
            predict = _predict_of(booster, threads)
            found = _metadata(booster, predict)
        size_bytes = tabular.settled_bytes(
            growth.bytes_, _predicted_bytes(content_bytes), content_bytes, _BOOSTER_BYTES
        )
        names = tabular.stated_features(booster.feature_name(), spec)
        width = tabular.width_of(found)
        metadata = tabular.described(found, spec)
        return LightgbmModel(predict, names, width, metadata, size_bytes, self._heap)


def model_file(spec: ModelSpec) -> Path:
    """The file to load; raises LoadFailed when there is none or more than one could be meant."""
    return tabular.only_file(spec, SUFFIXES)


def _checked(path: Path, spec: ModelSpec) -> str:
    """The file's text, held to be what LightGBM can be trusted with."""
    tabular.file_bytes(path, spec)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise tabular.unreadable(path, spec, error) from None
    tabular.refuse_foreign(path, content, spec, "lightgbm")
    try:
        check_model(content)
        return content.decode()
    except (Malformed, UnicodeDecodeError) as error:
        raise LoadFailed(
            f"model {spec.model_id!r}: {path.name} is no whole LightGBM text: {error}"
        ) from None


def _predict_of(booster: Any, threads: int) -> Predict:
    return lambda matrix: booster.predict(matrix, num_threads=threads)


def _metadata(booster: Any, predict: Predict) -> ModelMetadata:
    width = int(booster.num_feature())
    shape: tuple[int, ...] = (-1, -1)
    if width <= _PROBED_FEATURES_MAX:
        answer = np.asarray(predict(np.zeros((1, width))))
        shape = (-1, 1) if answer.ndim == 1 else (-1, *answer.shape[1:])
    return ModelMetadata(
        platform=PLATFORM,
        versions=(),
        inputs=(TensorSpec("input", "FP64", (-1, width)),),
        outputs=(TensorSpec(OUTPUT, "FP64", shape),),
        accepts_any_input=True,
    )


def _predicted_bytes(content_bytes: int) -> int:
    return round(content_bytes * _CONTENT_FACTOR) + _BOOSTER_BYTES
