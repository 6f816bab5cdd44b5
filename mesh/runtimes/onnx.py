"""ONNX models through onnxruntime, set up for density: many small models in one process.

Owns the session options, the mapping of onnxruntime's types and errors to ours, and the size of a
model. onnxruntime is imported by the first load. Fails with ``LoadFailed`` (FAILED_PRECONDITION)
when the file is corrupt, missing or uses what we do not carry, with ``InvalidArgument`` when a
request's contents are at fault.

Measured on one core for a model of 64x512x10, per call: ``session.run`` 8.4 us, io binding 11 us,
OrtValues 8 us, the session object underneath with one shared ``RunOptions`` 6.0 us: the last is
used. The memory arena is off: it kept another 1 MB per model after its first run, for no gain at
this size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from mesh.oip.datatypes import DATATYPES
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.onnx_file import outline

MODEL_FILE: Final = "model.onnx"
PLATFORM: Final = "onnxruntime_onnx"

# A session without any node or weight, and the Python objects around it.
SESSION_BYTES: Final = 128 * 1024
# Measured 2.9 KB for an elementwise node.
NODE_BYTES: Final = 4 * 1024
# Weights are kept once; layouts packed for the matrix kernels pad them a little.
WEIGHTS_FACTOR: Final = 1.15

_DATATYPE_BY_ORT: Final[dict[str, str]] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
    "tensor(bfloat16)": "BF16",
}
# What a classifier converted with a ZipMap answers: one {class: probability} for each row.
_ZIPMAPS: Final = frozenset({"seq(map(int64,tensor(float)))", "seq(map(string,tensor(float)))"})
# onnx.TensorProto.BFLOAT16
_ONNX_BFLOAT16: Final = 16

# Output names, inputs, RunOptions.
Run = Callable[[list[str], Mapping[str, Any], Any], Sequence[Any]]
# A NamedTuple's own ``__new__`` is a Python function: twice the cost.
_new_tuple: Final = tuple.__new__


class OnnxModel:
    """One session. ``infer`` is safe from several threads: onnxruntime's own Run is."""

    __slots__ = (
        "_heap",
        "_kinds",
        "_names",
        "_options",
        "_run",
        "_special",
        "_text",
        "metadata",
        "size_bytes",
    )

    def __init__(
        self, session: Any, metadata: ModelMetadata, size_bytes: int, heap: NativeHeap
    ) -> None:
        self.metadata = metadata
        self.size_bytes = size_bytes
        self._heap = heap
        self._names = [spec.name for spec in metadata.outputs]
        self._kinds = {spec.name: spec.datatype for spec in metadata.outputs}
        zipmaps = {out.name for out in session.get_outputs() if out.type in _ZIPMAPS}
        kinds = {spec.datatype for spec in (*metadata.inputs, *metadata.outputs)}
        # These need work on the way in or out; every other model takes the short way.
        self._text = frozenset(s.name for s in metadata.inputs if s.datatype == "BYTES")
        self._special = bool(kinds & {"BYTES", "BF16"} or zipmaps)
        self._options = _run_options()
        self._run = _bf16_run(session, metadata) if "BF16" in kinds else _plain_run(session)

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        names = list(outputs) if outputs else self._names
        try:
            if self._special:
                return self._infer_special(inputs, names)
            results = self._run(names, inputs, self._options)
        except MeshError:
            raise
        except Exception as error:
            raise _run_error(error) from None
        if len(names) == 1:
            name = names[0]
            return [_new_tuple(Tensor, (name, self._kinds[name], results[0]))]
        kinds = self._kinds
        return [Tensor(name, kinds[name], data) for name, data in zip(names, results, strict=True)]

    def _infer_special(self, inputs: Mapping[str, Array], names: list[str]) -> list[Tensor]:
        if self._text:
            inputs = {
                name: _to_text(array, name) if name in self._text else array
                for name, array in inputs.items()
            }
        return [
            Tensor(name, self._kinds[name], _from_ort(data, self._kinds[name]))
            for name, data in zip(names, self._run(names, inputs, self._options), strict=True)
        ]

    def unload(self) -> None:
        # The session goes with the last reference to it, and with it its memory.
        self._run = _unloaded
        self._heap.released(self.size_bytes)


@dataclass(frozen=True, slots=True)
class OnnxSettings:
    """``intra_op_threads``: threads of one inference; many models share the cores, so one."""

    intra_op_threads: int = 1


class OnnxRuntime:
    """Loads ``model.onnx`` in a folder, a folder's only ``.onnx`` file, or a file."""

    model_types = ("onnx",)

    def __init__(
        self, settings: OnnxSettings | None = None, heap: NativeHeap | None = None
    ) -> None:
        self._settings = settings or OnnxSettings()
        self._heap = heap or NativeHeap()
        # The first session allocates what all share; no model must be charged for it.
        self._warm = False

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        try:
            found = outline(model_file(spec))
        except OSError as error:
            raise _unreadable(spec, error) from None
        return _predicted_bytes(found.weights_bytes, found.node_count)

    def load(self, spec: ModelSpec) -> OnnxModel:
        path = model_file(spec)
        try:
            found = outline(path)
        except OSError as error:
            raise _unreadable(spec, error) from None
        import onnxruntime

        if not self._warm:
            _import_all(onnxruntime)
            self._warm = True
        with self._heap.measure() as growth:
            try:
                session = onnxruntime.InferenceSession(
                    str(path), _session_options(self._settings), providers=["CPUExecutionProvider"]
                )
            except Exception as error:
                raise _load_error(spec, path, error) from None
        predicted = _predicted_bytes(found.weights_bytes, found.node_count)
        size_bytes = settle_size(growth.bytes_, predicted, found.weights_bytes)
        return OnnxModel(session, _metadata(session, spec), size_bytes, self._heap)


def settle_size(measured_bytes: int | None, predicted_bytes: int, weights_bytes: int) -> int:
    """The measured size within what is possible; the prediction when there was no measurement.

    Mapped external data do not show on the heap, and other threads allocate meanwhile.
    """
    if measured_bytes is None:
        return predicted_bytes
    lowest = max(SESSION_BYTES // 2, round(weights_bytes * 0.9))
    highest = 2 * predicted_bytes
    return min(max(measured_bytes, lowest), highest)


def model_file(spec: ModelSpec) -> Path:
    """The file to load; raises LoadFailed when there is none or more than one could be meant."""
    path = spec.path
    if path.is_file():
        return path
    if not path.is_dir():
        raise LoadFailed(f"model {spec.model_id!r}: there is no file or folder at {path.name!r}")
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    candidates = sorted(entry.name for entry in path.glob("*.onnx"))
    if len(candidates) == 1:
        return path / candidates[0]
    found = ", ".join(candidates[:5]) if candidates else "no .onnx file"
    raise LoadFailed(
        f"model {spec.model_id!r}: the folder has no {MODEL_FILE}; found {found}. "
        f"Name one {MODEL_FILE} or point at the file itself"
    )


def _predicted_bytes(weights_bytes: int, node_count: int) -> int:
    return round(weights_bytes * WEIGHTS_FACTOR) + node_count * NODE_BYTES + SESSION_BYTES


def _import_all(onnxruntime: Any) -> None:
    """Makes onnxruntime allocate what the process needs once, with the smallest model there is."""
    # ModelProto: ir_version 8, opset 17, graph "g": x -> Identity -> y, both float of any shape.
    tensor_type = b"\x12\x04\x0a\x02\x08\x01"
    node = b"\x0a\x01x\x12\x01y\x22\x08Identity"
    graph = (
        *(b"\x0a", bytes((len(node),)), node, b"\x12\x01g"),
        *(b"\x5a", bytes((len(tensor_type) + 3,)), b"\x0a\x01x", tensor_type),
        *(b"\x62", bytes((len(tensor_type) + 3,)), b"\x0a\x01y", tensor_type),
    )
    body = b"".join(graph)
    model = b"\x08\x08\x3a" + bytes((len(body),)) + body + b"\x42\x02\x10\x11"
    onnxruntime.InferenceSession(
        model, _session_options(OnnxSettings()), providers=["CPUExecutionProvider"]
    ).run(None, {"x": np.zeros(1, np.float32)})


def _session_options(settings: OnnxSettings) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.intra_op_threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Its errors come as exceptions; its own log on stderr would repeat them.
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _run_options() -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


def _plain_run(session: Any) -> Run:
    """The session underneath, where this onnxruntime has it: the wrapper costs 2 us a call."""
    run: Run = getattr(getattr(session, "_sess", None), "run", None) or session.run
    return run


def _bf16_run(session: Any, metadata: ModelMetadata) -> Run:
    """numpy has no bfloat16: the values go in and out as OrtValues over their bits."""
    import onnxruntime

    value_of = onnxruntime.OrtValue.ortvalue_from_numpy
    typed_value_of = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    bf16 = {s.name for s in (*metadata.inputs, *metadata.outputs) if s.datatype == "BF16"}

    def run(names: list[str], inputs: Mapping[str, Any], options: Any) -> Sequence[Any]:
        # An OrtValue keeps no reference to the array it was made of: `arrays` must outlive it.
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        values = {
            name: typed_value_of(array, _ONNX_BFLOAT16) if name in bf16 else value_of(array)
            for name, array in arrays.items()
        }
        results = session.run_with_ort_values(names, values, options)
        return [
            _bits_of(value) if name in bf16 else value.numpy()
            for name, value in zip(names, results, strict=True)
        ]

    return run


def _bits_of(value: Any) -> Array:
    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, np.uint16)
    bits = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return np.array(bits, dtype=np.uint16).reshape(shape)


def _unloaded(names: list[str], inputs: Mapping[str, Any], options: Any) -> Sequence[Any]:
    raise Unavailable("the model was unloaded; try again")


def _to_text(array: Array, name: str) -> Array:
    """onnxruntime's strings are UTF-8; given bytes it would write their repr."""
    text = np.empty(array.shape, dtype=object)
    flat = text.ravel()
    for index, element in enumerate(array.ravel().tolist()):
        try:
            flat[index] = element.decode() if isinstance(element, bytes) else str(element)
        except UnicodeDecodeError:
            raise InvalidArgument(
                f"input {name!r}: element {index} is not UTF-8, and an ONNX model's strings are"
            ) from None
    return text


def _from_ort(data: Any, kind: str) -> Array:
    if isinstance(data, list):  # a ZipMap's rows
        rows: Array = np.array([list(row.values()) for row in data], dtype=np.float32)
        return rows.reshape(len(data), -1) if data else np.empty((0, 0), np.float32)
    array: Array = data
    if kind != "BYTES":
        return array
    encoded = np.empty(array.shape, dtype=object)
    flat = encoded.ravel()
    for index, element in enumerate(array.ravel().tolist()):
        flat[index] = str(element).encode()
    return encoded


def _metadata(session: Any, spec: ModelSpec) -> ModelMetadata:
    return ModelMetadata(
        platform=PLATFORM,
        versions=(),
        inputs=tuple(_tensor_spec(arg, spec, "input") for arg in session.get_inputs()),
        outputs=tuple(_tensor_spec(arg, spec, "output") for arg in session.get_outputs()),
    )


def _tensor_spec(arg: Any, spec: ModelSpec, role: str) -> TensorSpec:
    if role == "output" and arg.type in _ZIPMAPS:
        return TensorSpec(arg.name, "FP32", (-1, -1))
    kind = _DATATYPE_BY_ORT.get(arg.type)
    if kind is None:
        raise LoadFailed(
            f"model {spec.model_id!r}: {role} {arg.name!r} is a {arg.type}, which the Open "
            f"Inference Protocol cannot carry; it can {', '.join(DATATYPES)}"
        )
    shape = tuple(axis if isinstance(axis, int) and axis > 0 else -1 for axis in (arg.shape or ()))
    # onnxruntime tells a scalar and an unknown rank alike; it checks the rank itself.
    return TensorSpec(arg.name, kind, shape, any_rank=not shape)


def _unreadable(spec: ModelSpec, error: OSError) -> LoadFailed:
    return LoadFailed(
        f"model {spec.model_id!r}: its file cannot be read: {error.strerror or error}",
        code=Code.UNAVAILABLE,
    )


def _load_error(spec: ModelSpec, path: Path, error: Exception) -> MeshError:
    if isinstance(error, MemoryError) or "bad_alloc" in str(error):
        return LoadFailed(
            f"model {spec.model_id!r}: out of memory while loading {path.name}",
            code=Code.UNAVAILABLE,
        )
    # The client must not learn where on the disk the artifact lies.
    cause = _cause(error).replace(str(path), path.name).replace(str(path.parent), ".")
    return LoadFailed(f"model {spec.model_id!r}: onnxruntime cannot load {path.name}: {cause}")


def _run_error(error: Exception) -> MeshError:
    cause = _cause(error)
    if isinstance(error, MemoryError) or "bad_alloc" in cause:
        return ResourceExhausted(f"out of memory while running the model: {cause}")
    if "INVALID_ARGUMENT" in cause or type(error).__name__ == "InvalidArgument":
        return InvalidArgument(f"onnxruntime refused the input: {cause}")
    return Internal(f"onnxruntime failed: {cause}")


def _cause(error: Exception) -> str:
    """One line, without onnxruntime's prefix, bounded."""
    text = " ".join(str(error).split())
    return text.removeprefix("[ONNXRuntimeError] : ")[:500]
