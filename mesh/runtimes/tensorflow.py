"""TensorFlow models: SavedModel folders, and Keras' ``.keras`` and ``.h5``.

A SavedModel answers by one signature: ``serving_default``, the one that the description file's
parameter ``signature`` names, or its only one. Keras files load in safe mode: a Lambda layer, which
is code, is refused. TensorFlow keeps the memory of a model that is gone, so this format runs in a
worker process unless told otherwise, and the worker's end gives it back. Fails with ``LoadFailed``
(FAILED_PRECONDITION) for a folder or file that holds no such model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.core.errors import Internal, InvalidArgument, LoadFailed, ResourceExhausted
from mesh.formats import SAVED_MODEL
from mesh.runtimes import tabular
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.settings import RuntimeSettings

PLATFORM: Final = "tensorflow"
KERAS_SUFFIXES: Final = (".keras", ".h5")
DEFAULT_SIGNATURE: Final = "serving_default"

_CONTENT_FACTOR: Final = 2.0
_GRAPH_BYTES: Final = 8 * 1024 * 1024

_DATATYPE_BY_TF: Final[dict[str, str]] = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "string": "BYTES",
    "bfloat16": "BF16",
}

# Tensors by name in, tensors by name out.
Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class TensorflowModel:
    def __init__(
        self, run: Run, keep: Any, metadata: ModelMetadata, size_bytes: int, tf: Any
    ) -> None:
        self.metadata = metadata
        self.size_bytes = size_bytes
        self._run = run
        self._keep = keep  # a signature does not keep its model's variables alive
        self._tf = tf
        self._kinds = {spec.name: spec.datatype for spec in metadata.outputs}
        self._types = {spec.name: _tf_type(tf, spec.datatype) for spec in metadata.inputs}

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        tf = self._tf
        try:
            tensors = {name: self._in(name, array) for name, array in inputs.items()}
            found = self._run(tensors)
            names = outputs or tuple(self._kinds)
            return [_out(name, self._kinds[name], found[name]) for name in names]
        except (tf.errors.InvalidArgumentError, ValueError, TypeError) as error:
            raise InvalidArgument(
                f"TensorFlow refused the input: {tabular.one_line(error)}"
            ) from None
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            raise ResourceExhausted(f"out of memory: {tabular.one_line(error)}") from None
        except Exception as error:
            raise Internal(f"TensorFlow failed: {tabular.one_line(error)}") from None

    def _in(self, name: str, array: Array) -> Any:
        kind = self._types[name]
        if kind == self._tf.bfloat16:
            return self._tf.bitcast(self._tf.constant(array, self._tf.uint16), kind)
        return self._tf.constant(array, dtype=kind)

    def unload(self) -> None:
        self._run = _unloaded
        self._keep = None
        self._tf.keras.backend.clear_session()


class TensorflowRuntime:
    model_types = ("tensorflow",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(_content_bytes(_model_path(spec)))

    def load(self, spec: ModelSpec) -> TensorflowModel:
        path = _model_path(spec)
        content_bytes = _content_bytes(path)
        tf = _import(spec.options.threads or self._settings.intra_op_threads)
        with self._heap.measure() as growth:
            try:
                if path.is_dir():
                    run, keep, metadata = _saved_model(tf, path, spec)
                else:
                    run, keep, metadata = _keras(tf, path, spec)
            except LoadFailed:
                raise
            except Exception as error:
                raise LoadFailed(
                    f"model {spec.model_id!r}: TensorFlow cannot load {path.name}: "
                    f"{type(error).__name__}: {tabular.one_line(error)}"
                ) from None
        predicted = _predicted_bytes(content_bytes)
        measured = growth.bytes_ or predicted
        size_bytes = min(max(measured, content_bytes), 2 * predicted)
        return TensorflowModel(run, keep, metadata, size_bytes, tf)


def _import(threads: int) -> Any:
    """TensorFlow, silent and with bounded threads: both can be said before its first use only."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:  # an earlier model has started them
        pass
    tf.get_logger().setLevel("ERROR")
    return tf


def _saved_model(tf: Any, path: Path, spec: ModelSpec) -> tuple[Run, Any, ModelMetadata]:
    loaded = tf.saved_model.load(str(path))
    signatures = dict(loaded.signatures)
    wanted = spec.options.parameters.get("signature", "")
    name = wanted or (DEFAULT_SIGNATURE if DEFAULT_SIGNATURE in signatures else "")
    if not name and len(signatures) == 1:
        name = next(iter(signatures))
    if name not in signatures:
        raise LoadFailed(
            f"model {spec.model_id!r}: the SavedModel has no signature "
            f"{wanted or DEFAULT_SIGNATURE!r}; it has {sorted(signatures) or 'none'}"
        )
    signature = signatures[name]
    _, arguments = signature.structured_input_signature
    metadata = ModelMetadata(
        platform=PLATFORM,
        versions=(),
        inputs=tuple(_spec_of(arg, one, spec) for arg, one in sorted(arguments.items())),
        outputs=tuple(
            _spec_of(out, one, spec) for out, one in sorted(signature.structured_outputs.items())
        ),
    )
    return lambda tensors: signature(**tensors), loaded, metadata


def _keras(tf: Any, path: Path, spec: ModelSpec) -> tuple[Run, Any, ModelMetadata]:
    model = tf.keras.models.load_model(str(path), compile=False, safe_mode=True)
    ins, outs = _named(model.inputs), _named(model.outputs, "output")
    metadata = ModelMetadata(
        platform=PLATFORM,
        versions=(),
        inputs=tuple(_spec_of(name, one, spec) for name, one in ins.items()),
        outputs=tuple(_spec_of(name, one, spec) for name, one in outs.items()),
    )
    call = tf.function(lambda *tensors: model(list(tensors) if len(tensors) > 1 else tensors[0]))

    def run(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        found = call(*(tensors[name] for name in ins))
        if isinstance(found, Mapping):
            return found
        flat = list(found) if isinstance(found, list | tuple) else [found]
        return dict(zip(outs, flat, strict=True))

    return run, model, metadata


def _named(tensors: Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """Keras' names of outputs are those of inner operations: numbered instead."""
    if prefix:
        return {f"{prefix}_{index}": one for index, one in enumerate(tensors)}
    return {str(one.name).partition(":")[0]: one for one in tensors}


def _spec_of(name: str, one: Any, spec: ModelSpec) -> TensorSpec:
    kind_name = one.dtype if isinstance(one.dtype, str) else one.dtype.name
    kind = _DATATYPE_BY_TF.get(kind_name)
    if kind is None:
        raise LoadFailed(
            f"model {spec.model_id!r}: tensor {name!r} is a {kind_name}, which the Open Inference "
            "Protocol cannot carry"
        )
    shape = one.shape
    if getattr(shape, "rank", 0) is None:
        return TensorSpec(name, kind, (), any_rank=True)
    return TensorSpec(name, kind, tuple(-1 if axis is None else int(axis) for axis in shape))


def _tf_type(tf: Any, kind: str) -> Any:
    name = next(name for name, found in _DATATYPE_BY_TF.items() if found == kind)
    return getattr(tf, name)


def _out(name: str, kind: str, value: Any) -> Tensor:
    array: Array = np.asarray(value)
    if kind == "BYTES":
        return Tensor(name, kind, array.astype(object))
    if kind == "BF16":
        return Tensor(name, kind, array.view(np.uint16))
    return Tensor(name, kind, array)


def _model_path(spec: ModelSpec) -> Path:
    """A folder with a SavedModel, or a Keras file."""
    path = spec.path
    if spec.options.file and path.is_dir() and (path / spec.options.file).exists():
        path = path / spec.options.file
    if path.is_dir():
        if (path / SAVED_MODEL).is_file():
            return path
        inner = path / "model.savedmodel"  # as Triton's repositories have it
        if (inner / SAVED_MODEL).is_file():
            return inner
        return tabular.only_file(spec, KERAS_SUFFIXES)
    return tabular.only_file(spec, KERAS_SUFFIXES)


def _content_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def _predicted_bytes(content_bytes: int) -> int:
    return round(content_bytes * _CONTENT_FACTOR) + _GRAPH_BYTES


def _unloaded(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    raise Internal("the model was unloaded")
