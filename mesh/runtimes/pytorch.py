"""PyTorch models: TorchScript (``.pt``, ``.pth``) and ``torch.export`` (``.pt2``), CPU or CUDA.

A file that holds pickled modules or weights only is refused: loading it would run code, or there
would be nothing to run. TorchScript tells the names of its arguments and no shapes; inputs are then
of any rank, and FP32 where the description file does not say otherwise. Outputs are named
``OUTPUT__0``... as Triton's are, or by the keys of a dict. Names of the form ``NAME__<n>`` in a
description file mean the argument at that place, other names the argument of that name.

torch's number of threads belongs to the process: the first model's setting counts. torch is
imported by the first load. Fails with ``LoadFailed`` (FAILED_PRECONDITION).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.core.errors import Code, Internal, InvalidArgument, LoadFailed, ResourceExhausted
from mesh.oip.datatypes import DATATYPES
from mesh.runtimes import tabular
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.settings import RuntimeSettings

PLATFORM: Final = "pytorch"
SCRIPT_SUFFIXES: Final = (".pt", ".pth")
EXPORT_SUFFIX: Final = ".pt2"
OUTPUT: Final = "OUTPUT__"

_CONTENT_FACTOR: Final = 1.2
_MODULE_BYTES: Final = 1024 * 1024
_INDEXED: Final = re.compile(r".*__(\d+)")

_DATATYPE_BY_TORCH: Final[dict[str, str]] = {
    "torch.bool": "BOOL",
    "torch.uint8": "UINT8",
    "torch.uint16": "UINT16",
    "torch.uint32": "UINT32",
    "torch.uint64": "UINT64",
    "torch.int8": "INT8",
    "torch.int16": "INT16",
    "torch.int32": "INT32",
    "torch.int64": "INT64",
    "torch.float16": "FP16",
    "torch.float32": "FP32",
    "torch.float64": "FP64",
    "torch.bfloat16": "BF16",
}


class PytorchModel:
    """``order``: the inputs' names in the order of the module's arguments."""

    def __init__(
        self,
        module: Any,
        order: Sequence[str],
        metadata: ModelMetadata,
        size_bytes: int,
        device: str,
        heap: NativeHeap,
    ) -> None:
        import torch

        self.metadata = metadata
        self.size_bytes = size_bytes
        self._torch = torch
        self._module = module
        self._order = tuple(order)
        self._device = device
        self._heap = heap
        self._bf16 = frozenset(s.name for s in metadata.inputs if s.datatype == "BF16")
        self._names = [spec.name for spec in metadata.outputs]

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        torch = self._torch
        try:
            with torch.inference_mode():
                found = self._module(*(self._in(name, inputs[name]) for name in self._order))
                tensors = self._out(found)
        except MemoryError:
            raise ResourceExhausted("out of memory while running the model") from None
        except Exception as error:
            cause = _cause(error)
            if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in cause:
                raise ResourceExhausted(f"out of memory: {cause}") from None
            if isinstance(error, RuntimeError | ValueError | TypeError | IndexError):
                raise InvalidArgument(f"PyTorch refused the input: {cause}") from None
            raise Internal(f"PyTorch failed: {cause}") from None
        if not outputs:
            return tensors
        by_name = {tensor.name: tensor for tensor in tensors}
        missing = [name for name in outputs if name not in by_name]
        if missing:
            raise Internal(f"the model answered without {missing[0]!r}, which it declares")
        return [by_name[name] for name in outputs]

    def _in(self, name: str, array: Array) -> Any:
        torch = self._torch
        if not array.flags.writeable or not array.flags.c_contiguous:
            array = np.array(array)  # torch takes no read-only views
        tensor = torch.from_numpy(array)
        if name in self._bf16:
            tensor = tensor.view(torch.bfloat16)
        return tensor if self._device == "cpu" else tensor.to(self._device)

    def _out(self, found: Any) -> list[Tensor]:
        if isinstance(found, Mapping):
            named = {str(name): value for name, value in found.items()}
        else:
            flat = list(found) if isinstance(found, list | tuple) else [found]
            known = self._names
            named = {
                known[index] if index < len(known) else f"{OUTPUT}{index}": value
                for index, value in enumerate(flat)
            }
        return [self._tensor(name, value) for name, value in named.items()]

    def _tensor(self, name: str, value: Any) -> Tensor:
        torch = self._torch
        if not isinstance(value, torch.Tensor):
            value = torch.as_tensor(value)
        kind = _DATATYPE_BY_TORCH.get(str(value.dtype))
        if kind is None:
            raise Internal(f"output {name!r} is a {value.dtype}, which no datatype carries")
        value = value.detach().cpu().contiguous()
        if kind == "BF16":
            value = value.view(torch.int16)
            return Tensor(name, kind, value.numpy().view(np.uint16))
        return Tensor(name, kind, value.numpy())

    def unload(self) -> None:
        self._module = None
        if self._device != "cpu":
            self._torch.cuda.empty_cache()
        self._heap.released(self.size_bytes)


class PytorchRuntime:
    """Loads ``model.pt2``, ``model.pt``, or a folder's only such file."""

    model_types = ("pytorch",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap
        self._threads_set = False

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(tabular.file_bytes(_file(spec), spec))

    def load(self, spec: ModelSpec) -> PytorchModel:
        path = _file(spec)
        content_bytes = tabular.file_bytes(path, spec)
        _check_archive(path, spec)
        import torch

        device = self._settings.device
        if device != "cpu" and not torch.cuda.is_available():
            raise LoadFailed(
                f"model {spec.model_id!r}: this instance was told to use {device} (--device), and "
                "PyTorch finds no such device",
                code=Code.UNAVAILABLE,
            )
        if not self._threads_set:
            self._threads_set = True
            torch.set_num_threads(spec.options.threads or self._settings.intra_op_threads)
        before = 0 if device == "cpu" else torch.cuda.memory_allocated(device)
        try:
            if path.suffix == EXPORT_SUFFIX:
                module, order, metadata = _exported(torch, path, spec, device)
            else:
                module, order, metadata = _scripted(torch, path, spec, device)
        except LoadFailed:
            raise
        except Exception as error:
            raise LoadFailed(
                f"model {spec.model_id!r}: PyTorch cannot load {path.name}: {_cause(error)}"
            ) from None
        if device == "cpu":
            held = _held_bytes(module)
        else:
            held = torch.cuda.memory_allocated(device) - before
        size_bytes = max(held, content_bytes // 2) + _MODULE_BYTES
        return PytorchModel(module, order, metadata, size_bytes, device, self._heap)


def _file(spec: ModelSpec) -> Path:
    if spec.options.file and not spec.path.is_file():
        return spec.path / spec.options.file
    return tabular.only_file(spec, (EXPORT_SUFFIX, *SCRIPT_SUFFIXES))


def _check_archive(path: Path, spec: ModelSpec) -> None:
    """Looks at the names in the archive; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise LoadFailed(
            f"model {spec.model_id!r}: {path.name} is no archive of PyTorch's, or is cut off; save "
            "the model with torch.jit.save or torch.export.save"
        ) from None
    scripted = any(name.endswith("/constants.pkl") or "/code/" in name for name in names)
    exported = any("exported_program" in name or "/models/" in name for name in names)
    if (path.suffix == EXPORT_SUFFIX and not exported) or (
        path.suffix != EXPORT_SUFFIX and not scripted
    ):
        raise LoadFailed(
            f"model {spec.model_id!r}: {path.name} holds weights or pickled modules, not a program "
            "that can be run without its code; save the model with torch.jit.save (.pt) or "
            "torch.export.save (.pt2)"
        )


def _scripted(
    torch: Any, path: Path, spec: ModelSpec, device: str
) -> tuple[Any, list[str], ModelMetadata]:
    module = torch.jit.load(str(path), map_location=device)
    module.eval()
    # The first runs of the profiling executor compile anew for each shape: seconds, for nothing.
    torch._C._jit_set_profiling_executor(False)
    arguments = [argument.name for argument in module.forward.schema.arguments[1:]]
    options = spec.options
    order, inputs = _arranged(arguments, options.inputs, spec)
    outputs = options.outputs or (TensorSpec(f"{OUTPUT}0", "FP32", (), any_rank=True),)
    metadata = ModelMetadata(PLATFORM, (), inputs, outputs, accepts_any_input=False)
    return module, order, metadata


def _arranged(
    arguments: list[str], stated: tuple[TensorSpec, ...], spec: ModelSpec
) -> tuple[list[str], tuple[TensorSpec, ...]]:
    """(the inputs' names in the order of the arguments, the inputs)"""
    if not stated:
        found = tuple(TensorSpec(name, "FP32", (), any_rank=True) for name in arguments)
        return list(arguments), found
    places: dict[int, str] = {}
    for one in stated:
        indexed = _INDEXED.fullmatch(one.name)
        if one.name in arguments:
            places[arguments.index(one.name)] = one.name
        elif indexed is not None:
            places[int(indexed[1])] = one.name
    if sorted(places) != list(range(len(stated))) or len(stated) > len(arguments):
        raise LoadFailed(
            f"model {spec.model_id!r}: {spec.options.source} names the inputs "
            f"{[one.name for one in stated]}; the model's arguments are {arguments}. Name them "
            "so, or INPUT__0, INPUT__1 ... by their place"
        )
    return [places[index] for index in range(len(stated))], stated


def _exported(
    torch: Any, path: Path, spec: ModelSpec, device: str
) -> tuple[Any, list[str], ModelMetadata]:
    program = torch.export.load(str(path))
    signature = program.graph_signature
    nodes = {node.name: node for node in program.graph.nodes}
    names = [name for name in signature.user_inputs if isinstance(name, str)]
    inputs = tuple(_graph_spec(name, name, nodes, spec) for name in names)
    outputs = tuple(
        _graph_spec(f"{OUTPUT}{index}", name, nodes, spec)
        for index, name in enumerate(signature.user_outputs)
        if isinstance(name, str)
    )
    module = program.module()
    if device != "cpu":
        module = module.to(device)
    order, arranged = list(names), inputs
    if spec.options.inputs:
        order, arranged = _arranged(names, spec.options.inputs, spec)
    metadata = ModelMetadata(PLATFORM, (), arranged, spec.options.outputs or outputs)
    return module, order, metadata


def _graph_spec(name: str, node_name: str, nodes: Mapping[str, Any], spec: ModelSpec) -> TensorSpec:
    value = nodes[node_name].meta["val"]
    kind = _DATATYPE_BY_TORCH.get(str(value.dtype))
    if kind is None or kind not in DATATYPES:
        raise LoadFailed(
            f"model {spec.model_id!r}: tensor {name!r} is a {value.dtype}, which the Open "
            "Inference Protocol cannot carry"
        )
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in value.shape)
    return TensorSpec(name, kind, shape)


def _held_bytes(module: Any) -> int:
    seen: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _predicted_bytes(content_bytes: int) -> int:
    return round(content_bytes * _CONTENT_FACTOR) + _MODULE_BYTES


def _cause(error: Exception) -> str:
    """The line that says what is wrong: TorchScript's come with the trace of the model's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("RuntimeError:")]
    return (told[-1] if told else lines[0] if lines else type(error).__name__)[:500]
