"""TensorFlow models: SavedModel folders, and Keras' ``.keras`` and ``.h5``; on the CPU.

A SavedModel answers by one signature: ``serving_default``, the one that the description file's
parameter ``signature`` names, or its only one. A Keras model is traced once, at load, for any
number of rows. Keras files load in safe mode: a Lambda layer, which is code, is refused. A
SavedModel's graph may read and write files, as TensorFlow has operations for that.

TensorFlow keeps memory of models that are gone (graphs and functions of its one context), so this
format runs in a worker process unless told otherwise, and the worker's end gives it back. Threads
and log level belong to the process: the first model's setting counts. ``infer`` is safe from
several threads. Fails with ``LoadFailed`` (FAILED_PRECONDITION) for a folder or file that holds no
such model, with INVALID_ARGUMENT when a request's tensors are at fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    Unavailable,
)
from mesh.formats import SAVED_MODEL
from mesh.oip.datatypes import DATATYPES
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


@dataclass(frozen=True, slots=True)
class Program:
    """``keep`` must live as long as ``run`` does: a signature does not keep its variables."""

    run: Run
    keep: Any
    metadata: ModelMetadata


class TensorflowModel:
    __slots__ = ("_heap", "_keep", "_kinds", "_run", "_tf", "_types", "metadata", "size_bytes")

    def __init__(self, tf: Any, program: Program, size_bytes: int, heap: NativeHeap) -> None:
        self.metadata = program.metadata
        self.size_bytes = size_bytes
        self._run = program.run
        self._keep = program.keep
        self._tf = tf
        self._heap = heap
        self._kinds = {spec.name: spec.datatype for spec in self.metadata.outputs}
        self._types = {spec.name: _tf_type(tf, spec.datatype) for spec in self.metadata.inputs}

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        try:
            found = self._run({name: self._in(name, array) for name, array in inputs.items()})
        except MeshError:
            raise
        except Exception as error:
            raise _run_error(self._tf, error) from None
        try:
            return [_out(name, self._kinds[name], found[name]) for name in outputs or self._kinds]
        except Exception as error:
            raise Internal(
                f"the model's answer cannot be sent: {type(error).__name__}: "
                f"{tabular.one_line(error)}"
            ) from None

    def _in(self, name: str, array: Array) -> Any:
        kind = self._types[name]
        if kind == self._tf.bfloat16:
            return self._tf.bitcast(self._tf.constant(array, self._tf.uint16), kind)
        return self._tf.constant(array, dtype=kind)

    def unload(self) -> None:
        self._run = _unloaded
        self._keep = None
        self._heap.released(self.size_bytes)


class TensorflowRuntime:
    model_types = ("tensorflow",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(_content_bytes(_model_path(spec), spec))

    def load(self, spec: ModelSpec) -> TensorflowModel:
        path = _model_path(spec)
        content_bytes = _content_bytes(path, spec)
        tf = _import(spec.options.threads or self._settings.intra_op_threads)
        with self._heap.measure() as growth:
            try:
                program = (_saved_model if path.is_dir() else _keras)(tf, path, spec)
            except MeshError:
                raise
            except Exception as error:
                raise _load_error(tf, path, spec, error) from None
        predicted = _predicted_bytes(content_bytes)
        size_bytes = min(max(growth.bytes_ or predicted, content_bytes), 2 * predicted)
        return TensorflowModel(tf, program, size_bytes, self._heap)


def _import(threads: int) -> Any:
    """TensorFlow, silent and with bounded threads: both can be said before its first use only."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        # It would take all of the memory of each GPU, which other models of the pod use.
        tf.config.set_visible_devices([], "GPU")
        tf.constant(0)  # what all models share is made now, and charged to none of them
    except RuntimeError:  # an earlier model has started it
        pass
    tf.get_logger().setLevel("ERROR")
    return tf


def _saved_model(tf: Any, path: Path, spec: ModelSpec) -> Program:
    loaded = tf.saved_model.load(str(path))
    signatures = dict(loaded.signatures)
    wanted = spec.options.parameters.get("signature", "")
    name = wanted or (DEFAULT_SIGNATURE if DEFAULT_SIGNATURE in signatures else "")
    if not name and len(signatures) == 1:
        name = next(iter(signatures))
    if name not in signatures:
        raise LoadFailed(
            f"model {spec.model_id!r}: the SavedModel has no signature "
            f"{wanted or DEFAULT_SIGNATURE!r}; it has {sorted(signatures) or 'none'}. Name one "
            "with the parameter 'signature' in its description file"
        )
    signature = signatures[name]
    _, arguments = signature.structured_input_signature
    metadata = _metadata(arguments, signature.structured_outputs, spec)
    return Program(lambda tensors: signature(**tensors), loaded, metadata)


def _keras(tf: Any, path: Path, spec: ModelSpec) -> Program:
    model = tf.keras.models.load_model(str(path), compile=False, safe_mode=True)
    form = _input_form(model)
    if form is None:
        raise LoadFailed(
            f"model {spec.model_id!r}: {path.name} does not tell its inputs (a subclassed model "
            "that was never called); export it as a SavedModel: model.export(folder)"
        )
    ins = {str(one.name).partition(":")[0]: one for one in tf.nest.flatten(form)}
    pack = tf.nest.pack_sequence_as
    # Traced here, for all sizes: tracing at requests would make a graph for each batch size.
    call = tf.function(
        lambda *tensors: model(pack(form, tensors), training=False), autograph=False
    ).get_concrete_function(
        *(tf.TensorSpec(one.shape, one.dtype, name=f"in_{n}") for n, one in enumerate(ins.values()))
    )
    outs = _by_name(call.structured_outputs)
    metadata = _metadata(ins, outs, spec)

    def run(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        return _by_name(call(*(tensors[name] for name in ins)))

    return Program(run, model, metadata)


def _input_form(model: Any) -> Any:
    """A tensor, or a list or dict of them; None where the model does not tell."""
    try:
        return model.input
    except (AttributeError, ValueError):  # a Sequential has its tensors only
        inputs = getattr(model, "inputs", None)
        return inputs[0] if inputs and len(inputs) == 1 else inputs


def _by_name(found: Any) -> dict[str, Any]:
    """A dict's keys, else numbers: Keras' own names of outputs are those of inner operations."""
    if isinstance(found, Mapping):
        return {str(name): one for name, one in found.items()}
    flat = found if isinstance(found, list | tuple) else (found,)
    return {f"output_{index}": one for index, one in enumerate(flat)}


def _metadata(
    inputs: Mapping[str, Any], outputs: Mapping[str, Any], spec: ModelSpec
) -> ModelMetadata:
    return ModelMetadata(
        platform=PLATFORM,
        versions=(),
        inputs=tuple(_spec_of(name, one, spec) for name, one in sorted(inputs.items())),
        outputs=tuple(_spec_of(name, one, spec) for name, one in sorted(outputs.items())),
    )


def _spec_of(name: str, one: Any, spec: ModelSpec) -> TensorSpec:
    kind_name = one.dtype if isinstance(one.dtype, str) else one.dtype.name
    kind = _DATATYPE_BY_TF.get(kind_name)
    # Ragged and sparse tensors have a datatype, too.
    if kind is None or "Ragged" in type(one).__name__ or "Sparse" in type(one).__name__:
        raise LoadFailed(
            f"model {spec.model_id!r}: {name!r} is a {type(one).__name__} of {kind_name}, which "
            f"the Open Inference Protocol cannot carry; it can {', '.join(DATATYPES)}"
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
    if spec.options.file and path.is_dir():
        path = path / spec.options.file
    if path.is_dir():
        for folder in (path, path / "model.savedmodel"):  # as Triton's repositories have it
            if (folder / SAVED_MODEL).is_file():
                return folder
    elif path.name == SAVED_MODEL and path.is_file():
        return path.parent
    try:
        return tabular.only_file(replace(spec, path=path), KERAS_SUFFIXES)
    except LoadFailed as error:
        raise LoadFailed(f"{error.message}; nor is there a {SAVED_MODEL}") from None


def _content_bytes(path: Path, spec: ModelSpec) -> int:
    if path.is_file():
        return tabular.file_bytes(path, spec)
    try:
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    except OSError as error:
        raise tabular.unreadable(path, spec, error) from None


def _predicted_bytes(content_bytes: int) -> int:
    return round(content_bytes * _CONTENT_FACTOR) + _GRAPH_BYTES


def _unloaded(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    raise Unavailable("the model was unloaded; try again")


def _load_error(tf: Any, path: Path, spec: ModelSpec, error: Exception) -> LoadFailed:
    if isinstance(error, MemoryError | tf.errors.ResourceExhaustedError):
        return LoadFailed(
            f"model {spec.model_id!r}: out of memory while loading {path.name}",
            code=Code.UNAVAILABLE,
        )
    # The client must not learn where on the disk the artifact lies.
    cause = tabular.one_line(error).replace(str(path), path.name).replace(str(path.parent), ".")
    return LoadFailed(
        f"model {spec.model_id!r}: TensorFlow cannot load {path.name}: "
        f"{type(error).__name__}: {cause}"
    )


def _run_error(tf: Any, error: Exception) -> MeshError:
    cause = tabular.one_line(error)
    if isinstance(error, MemoryError | tf.errors.ResourceExhaustedError):
        return ResourceExhausted(f"out of memory while running the model: {cause}")
    refused = (tf.errors.InvalidArgumentError, tf.errors.OutOfRangeError, ValueError, TypeError)
    if isinstance(error, refused):
        return InvalidArgument(f"TensorFlow refused the input: {cause}")
    return Internal(f"TensorFlow failed: {cause}")
