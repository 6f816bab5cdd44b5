"""LightGBM models: its text form (``.txt``, ``.bst``), through ``Booster.predict``.

One matrix of features in, ``predict`` out, as LightGBM's objective shapes it: a value a row, or a
probability a class. lightgbm is imported by the first load; ``predict`` of one booster is safe from
several threads. Fails with ``LoadFailed`` (FAILED_PRECONDITION) for a file that is no LightGBM
model, with INVALID_ARGUMENT for rows that do not fit.
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

PLATFORM: Final = "lightgbm"
SUFFIXES: Final = (".txt", ".bst")
OUTPUT: Final = "predict"

# The text is kept beside the trees that are made of it.
_CONTENT_FACTOR: Final = 2.0
_BOOSTER_BYTES: Final = 256 * 1024
# Every LightGBM text ends so; a file without it was cut off, which the library does not notice.
_END: Final = b"end of parameters"
_TAIL_BYTES: Final = 256 * 1024


class LightgbmModel:
    __slots__ = ("_booster", "_heap", "_names", "_threads", "_width", "metadata", "size_bytes")

    def __init__(
        self,
        booster: Any,
        metadata: ModelMetadata,
        size_bytes: int,
        threads: int,
        heap: NativeHeap,
    ) -> None:
        self.metadata = metadata
        self.size_bytes = size_bytes
        self._booster = booster
        self._heap = heap
        self._threads = threads
        self._names = booster.feature_name()
        self._width = int(booster.num_feature())

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        matrix = tabular.number_matrix(inputs, self._names, self._width)
        if matrix.dtype not in (np.float32, np.float64):
            matrix = matrix.astype(np.float64)
        try:
            answer = self._booster.predict(matrix, num_threads=self._threads)
        except MemoryError:
            raise ResourceExhausted("out of memory in predict") from None
        except Exception as error:
            raise Internal(f"LightGBM failed: {tabular.one_line(error)}") from None
        return [tabular.column_tensor(OUTPUT, answer)]

    def unload(self) -> None:
        self._booster = None
        self._heap.released(self.size_bytes)


class LightgbmRuntime:
    model_types = ("lightgbm",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(tabular.file_bytes(_file(spec), spec))

    def load(self, spec: ModelSpec) -> LightgbmModel:
        path = _file(spec)
        content_bytes = tabular.file_bytes(path, spec)
        _check_text(path, content_bytes, spec)
        import lightgbm

        threads = spec.options.threads or self._settings.intra_op_threads
        with self._heap.measure() as growth:
            try:
                booster = lightgbm.Booster(model_file=str(path))
                found = _metadata(booster, threads)
            except MemoryError:
                raise LoadFailed(
                    f"model {spec.model_id!r}: out of memory while loading {path.name}",
                    code=Code.UNAVAILABLE,
                ) from None
            except Exception as error:
                raise LoadFailed(
                    f"model {spec.model_id!r}: LightGBM cannot load {path.name}: "
                    f"{tabular.one_line(error)}"
                ) from None
        predicted = _predicted_bytes(content_bytes)
        measured = predicted if growth.bytes_ is None else growth.bytes_ + _BOOSTER_BYTES
        size_bytes = min(max(measured, content_bytes // 2 + _BOOSTER_BYTES), 2 * predicted)
        metadata = tabular.described(found, spec)
        return LightgbmModel(booster, metadata, size_bytes, threads, self._heap)


def _file(spec: ModelSpec) -> Path:
    if spec.options.file and not spec.path.is_file():
        return spec.path / spec.options.file
    return tabular.only_file(spec, SUFFIXES)


def _check_text(path: Path, content_bytes: int, spec: ModelSpec) -> None:
    """LightGBM crashes the process on some texts that are not its own, and loads half a model."""
    with path.open("rb") as file:
        start = file.read(64)
        file.seek(max(0, content_bytes - _TAIL_BYTES))
        tail = file.read()
    if not start.startswith(b"tree\n"):
        what = "an XGBoost model" if start.lstrip()[:1] == b"{" or b"learner" in start else "none"
        raise LoadFailed(
            f"model {spec.model_id!r}: {path.name} is no LightGBM text (it begins with "
            f"{start[:12]!r})"
            + ("; it may be " + what + ": say modelFormat xgboost" if what != "none" else "")
        )
    if _END not in tail:
        raise LoadFailed(f"model {spec.model_id!r}: {path.name} is cut off: its end is missing")


def _metadata(booster: Any, threads: int) -> ModelMetadata:
    width = int(booster.num_feature())
    answer = np.asarray(booster.predict(np.zeros((1, width)), num_threads=threads))
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
