"""LiteRT (TensorFlow Lite) models: ``.tflite`` files, through ai_edge_litert's interpreter.

An interpreter runs one request at a time, so a copy keeps as many as ran at once, at most
``INTERPRETERS_MAX``; they share the file's mapping. Names are those of the model's signature where
it has one. A free first axis is resized to the request's rows. ai_edge_litert is imported by the
first load. Fails with ``LoadFailed`` (FAILED_PRECONDITION) for a file that is no LiteRT model.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.core.errors import Internal, LoadFailed, ResourceExhausted
from mesh.oip.datatypes import datatype_name
from mesh.runtimes import tabular
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.settings import RuntimeSettings

PLATFORM: Final = "tflite"
SUFFIXES: Final = (".tflite",)
INTERPRETERS_MAX: Final = 4

_CONTENT_FACTOR: Final = 1.3
_INTERPRETER_BYTES: Final = 256 * 1024
# At the fourth byte of the flatbuffer.
_MAGIC: Final = b"TFL3"


class TfliteModel:
    """``details``: of inputs and outputs by their public names."""

    def __init__(
        self,
        make: Any,
        first: Any,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        metadata: ModelMetadata,
        size_bytes: int,
        heap: NativeHeap,
    ) -> None:
        self.metadata = metadata
        self.size_bytes = size_bytes
        self._make = make
        self._idle = [first]
        self._slots = threading.Semaphore(INTERPRETERS_MAX)
        self._inputs = inputs
        self._outputs = outputs
        self._heap = heap

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        with self._slots:
            interpreter = self._take()
            try:
                return self._run(interpreter, inputs, outputs or tuple(self._outputs))
            except MemoryError:
                raise ResourceExhausted("out of memory while running the model") from None
            except (RuntimeError, ValueError) as error:
                raise Internal(f"LiteRT failed: {tabular.one_line(error)}") from None
            finally:
                self._idle.append(interpreter)

    def _take(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()

    def _run(
        self, interpreter: Any, inputs: Mapping[str, Array], names: Sequence[str]
    ) -> list[Tensor]:
        resized = False
        for name, array in inputs.items():
            index = self._inputs[name]["index"]
            detail = interpreter._get_tensor_details(index, 0)
            if tuple(detail["shape"]) != array.shape:
                interpreter.resize_tensor_input(index, array.shape)
                resized = True
        if resized:
            interpreter.allocate_tensors()
        for name, array in inputs.items():
            interpreter.set_tensor(self._inputs[name]["index"], array)
        interpreter.invoke()
        return [
            _tensor(name, interpreter.get_tensor(self._outputs[name]["index"])) for name in names
        ]

    def unload(self) -> None:
        self._idle.clear()
        self._make = None
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

        def make() -> Any:
            interpreter = Interpreter(model_path=str(path), num_threads=threads)
            interpreter.allocate_tensors()
            return interpreter

        with self._heap.measure() as growth:
            try:
                first = make()
                inputs, outputs = _details(first)
            except Exception as error:
                raise LoadFailed(
                    f"model {spec.model_id!r}: LiteRT cannot load {path.name}: "
                    f"{tabular.one_line(error)}"
                ) from None
        predicted = _predicted_bytes(content_bytes)
        # The file is mapped, not copied: its pages do not show on the heap.
        measured = predicted if growth.bytes_ is None else growth.bytes_ + content_bytes
        size_bytes = min(max(measured, content_bytes + _INTERPRETER_BYTES // 2), 2 * predicted)
        metadata = ModelMetadata(
            platform=PLATFORM,
            versions=(),
            inputs=tuple(_spec_of(name, detail, spec) for name, detail in inputs.items()),
            outputs=tuple(_spec_of(name, detail, spec) for name, detail in outputs.items()),
        )
        return TfliteModel(make, first, inputs, outputs, metadata, size_bytes, self._heap)


def _file(spec: ModelSpec) -> Path:
    if spec.options.file and not spec.path.is_file():
        return spec.path / spec.options.file
    return tabular.only_file(spec, SUFFIXES)


def _details(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """By the names of the signature, where there is just one, else by those of the graph."""
    inputs = {detail["name"]: detail for detail in interpreter.get_input_details()}
    outputs = {detail["name"]: detail for detail in interpreter.get_output_details()}
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return inputs, outputs
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    return dict(runner.get_input_details()), dict(runner.get_output_details())


def _spec_of(name: str, detail: Mapping[str, Any], spec: ModelSpec) -> TensorSpec:
    # A string tensor's dtype is numpy's bytes, which has no fixed width.
    kind = "BYTES" if detail["dtype"] is np.bytes_ else datatype_name(np.dtype(detail["dtype"]))
    if kind is None:
        raise LoadFailed(
            f"model {spec.model_id!r}: tensor {name!r} is a {detail['dtype']}, which the Open "
            "Inference Protocol cannot carry"
        )
    signature = detail.get("shape_signature")
    shape = detail["shape"] if signature is None or not len(signature) else signature
    return TensorSpec(name, kind, tuple(int(axis) for axis in shape))


def _tensor(name: str, array: Array) -> Tensor:
    if array.dtype.kind in "SO":
        return Tensor(name, "BYTES", array.astype(object))
    return Tensor(name, datatype_name(array.dtype) or "FP32", array)


def _predicted_bytes(content_bytes: int) -> int:
    return round(content_bytes * _CONTENT_FACTOR) + _INTERPRETER_BYTES
