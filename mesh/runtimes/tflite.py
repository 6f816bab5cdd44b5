"""LiteRT (TensorFlow Lite) models: ``.tflite`` files, through ai_edge_litert's interpreter.

An interpreter runs one request at a time, so a model keeps as many as ran at once, at most
``INTERPRETERS_MAX``; they share the file's content, which is read into memory: an evicted or
overwritten file does not reach a loaded model. One signature answers, and gives the names:
``serving_default``, the one that the description file's parameter ``signature`` names, or the only
one; a file without any has the names of its graph. Inputs are taken as the file declares them,
INT8 for one that is quantised so; a free axis is resized to the request. ai_edge_litert is imported
by the first load. Fails with ``LoadFailed`` (FAILED_PRECONDITION) for a file that is no LiteRT
model, with INVALID_ARGUMENT when a request's tensors are at fault.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.core.errors import (
    Code,
    InvalidArgument,
    LoadFailed,
    MeshError,
    ResourceExhausted,
    Unavailable,
)
from mesh.oip.datatypes import DATATYPES, datatype_name
from mesh.runtimes import tabular
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.settings import RuntimeSettings

PLATFORM: Final = "tflite"
SUFFIXES: Final = (".tflite",)
INTERPRETERS_MAX: Final = 4
DEFAULT_SIGNATURE: Final = "serving_default"

_CONTENT_FACTOR: Final = 1.3
_INTERPRETER_BYTES: Final = 256 * 1024
# At the fourth byte of the flatbuffer.
_MAGIC: Final = b"TFL3"


# Arrays by name in, arrays by name out; not for two threads at once.
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Program:
    """One interpreter. ``inputs`` and ``outputs``: LiteRT's details by public names."""

    run: Run
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


class TfliteModel:
    __slots__ = ("_heap", "_idle", "_make", "_slots", "_text", "metadata", "size_bytes")

    def __init__(
        self,
        make: Callable[[], Program],
        first: Program,
        metadata: ModelMetadata,
        size_bytes: int,
        heap: NativeHeap,
    ) -> None:
        self.metadata = metadata
        self.size_bytes = size_bytes
        self._make = make
        self._idle = [first.run]
        self._slots = threading.Semaphore(INTERPRETERS_MAX)
        self._text = frozenset(s.name for s in metadata.inputs if s.datatype == "BYTES")
        self._heap = heap

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        if self._text:
            inputs = {
                name: _text(name, array) if name in self._text else array
                for name, array in inputs.items()
            }
        with self._slots:
            try:
                run = self._idle.pop()
            except IndexError:
                run = self._make().run
            try:
                found = run(inputs)
            except MemoryError:
                raise ResourceExhausted("out of memory while running the model") from None
            except (RuntimeError, ValueError) as error:
                # The interpreter is not used again: its tensors may be half resized. What a load
                # has let pass fails for what it is given.
                raise InvalidArgument(
                    f"LiteRT refused the input: {tabular.one_line(error)}"
                ) from None
            self._idle.append(run)
        names = outputs or tuple(spec.name for spec in self.metadata.outputs)
        return [_tensor(name, found[name]) for name in names]

    def unload(self) -> None:
        self._idle.clear()
        self._make = _unloaded
        self._heap.released(self.size_bytes)


class TfliteRuntime:
    model_types = ("tflite",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(tabular.file_bytes(_file(spec), spec))

    def load(self, spec: ModelSpec) -> TfliteModel:
        path = _file(spec)
        content_bytes = tabular.file_bytes(path, spec)
        with path.open("rb") as file:
            if file.read(8)[4:] != _MAGIC:
                raise LoadFailed(f"model {spec.model_id!r}: {path.name} is no LiteRT model")
        from ai_edge_litert.interpreter import Interpreter

        threads = spec.options.threads or self._settings.intra_op_threads
        with self._heap.measure() as growth:
            try:
                content = path.read_bytes()

                def make() -> Program:
                    interpreter = Interpreter(model_content=content, num_threads=threads)
                    interpreter.allocate_tensors()
                    return _program(interpreter, spec)

                first = make()
            except MeshError:
                raise
            except Exception as error:
                raise _load_error(path, spec, error) from None
        predicted = _predicted_bytes(content_bytes)
        measured = predicted if growth.bytes_ is None else growth.bytes_
        size_bytes = min(max(measured, content_bytes + _INTERPRETER_BYTES // 2), 2 * predicted)
        metadata = ModelMetadata(
            platform=PLATFORM,
            versions=(),
            inputs=tuple(_spec_of(name, detail, spec) for name, detail in first.inputs.items()),
            outputs=tuple(_spec_of(name, detail, spec) for name, detail in first.outputs.items()),
        )
        return TfliteModel(make, first, metadata, size_bytes, self._heap)


def _file(spec: ModelSpec) -> Path:
    if spec.options.file and not spec.path.is_file():
        return spec.path / spec.options.file
    return tabular.only_file(spec, SUFFIXES)


def _program(interpreter: Any, spec: ModelSpec) -> Program:
    signatures = interpreter.get_signature_list()
    wanted = spec.options.parameters.get("signature", "")
    if not signatures and not wanted:
        return _unsigned(interpreter)
    name = wanted or (DEFAULT_SIGNATURE if DEFAULT_SIGNATURE in signatures else "")
    if not name and len(signatures) == 1:
        name = next(iter(signatures))
    if name not in signatures:
        raise LoadFailed(
            f"model {spec.model_id!r}: the file has no signature {wanted or DEFAULT_SIGNATURE!r}; "
            f"it has {sorted(signatures) or 'none'}. Name one with the parameter 'signature' in "
            "its description file"
        )
    runner = interpreter.get_signature_runner(name)
    return Program(
        lambda inputs: runner(**inputs),
        dict(runner.get_input_details()),
        dict(runner.get_output_details()),
    )


def _unsigned(interpreter: Any) -> Program:
    """By the names of the graph's tensors."""
    inputs = {str(detail["name"]): detail for detail in interpreter.get_input_details()}
    outputs = {str(detail["name"]): detail for detail in interpreter.get_output_details()}
    shapes = {name: tuple(detail["shape"]) for name, detail in inputs.items()}

    def run(given: Mapping[str, Array]) -> Mapping[str, Array]:
        resized = False
        for name, array in given.items():
            if shapes[name] != array.shape:
                interpreter.resize_tensor_input(inputs[name]["index"], array.shape)
                shapes[name] = array.shape
                resized = True
        if resized:
            interpreter.allocate_tensors()
        for name, array in given.items():
            interpreter.set_tensor(inputs[name]["index"], array)
        interpreter.invoke()
        return {name: interpreter.get_tensor(detail["index"]) for name, detail in outputs.items()}

    return Program(run, inputs, outputs)


def _spec_of(name: str, detail: Mapping[str, Any], spec: ModelSpec) -> TensorSpec:
    kind = _kind(np.dtype(detail["dtype"]))
    if kind is None:
        raise LoadFailed(
            f"model {spec.model_id!r}: {name!r} is a {np.dtype(detail['dtype'])}, which the Open "
            f"Inference Protocol cannot carry; it can {', '.join(DATATYPES)}"
        )
    signature = detail.get("shape_signature")
    shape = detail["shape"] if signature is None or not len(signature) else signature
    return TensorSpec(name, kind, tuple(int(axis) for axis in shape))


def _kind(dtype: np.dtype[Any]) -> str | None:
    # LiteRT's text is numpy's bytes.
    return "BYTES" if dtype.kind in "SO" else datatype_name(dtype)


def _text(name: str, array: Array) -> Array:
    """LiteRT's text is numpy's bytes of fixed width, which drops zeros at the end."""
    if any(element.endswith(b"\0") for element in array.ravel().tolist()):
        raise InvalidArgument(f"input {name!r}: LiteRT takes no text that ends in a zero byte")
    return array.astype(np.bytes_)


def _tensor(name: str, array: Array) -> Tensor:
    kind = _kind(array.dtype)
    if kind == "BYTES":
        array = array.astype(object)
    return Tensor(name, kind or "FP32", array)


def _predicted_bytes(content_bytes: int) -> int:
    return round(content_bytes * _CONTENT_FACTOR) + _INTERPRETER_BYTES


def _unloaded() -> Program:
    raise Unavailable("the model was unloaded; try again")


def _load_error(path: Path, spec: ModelSpec, error: Exception) -> LoadFailed:
    if isinstance(error, MemoryError):
        return LoadFailed(
            f"model {spec.model_id!r}: out of memory while loading {path.name}",
            code=Code.UNAVAILABLE,
        )
    if isinstance(error, OSError):
        return tabular.unreadable(path, spec, error)
    return LoadFailed(
        f"model {spec.model_id!r}: LiteRT cannot load {path.name}: {tabular.one_line(error)}"
    )
