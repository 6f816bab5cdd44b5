"""PyTorch models: TorchScript (``.pt``, ``.pth``) and ``torch.export`` (``.pt2``), CPU or CUDA.

A file that holds pickled modules or weights only is refused: loading it would run code, or there
would be nothing to run (``pytorch_archive`` tells). TorchScript tells the names of its arguments
and no shapes: inputs are then of any rank, and FP32 where the description file does not say
otherwise; arguments that have a default are left at it unless the description file lists them. An
exported program tells datatypes and shapes. Outputs are named ``OUTPUT__0``... as Triton's are, or
by the keys of a dict. Names of the form ``NAME__<n>`` in a description file mean the argument, or
the answer, at that place; an input's other name means the argument of that name.

torch's number of threads belongs to the process: the first model's setting counts for all. So does
TorchScript's profiling executor, which is off: it compiled a net of 30 layers anew in the first
call (121 ms against 29 ms) and for the second shape (21 ms against 2 ms), to be no faster later.
torch is imported by the first load; ``infer`` is safe from several threads, as modules in eval mode
are. Unloading gives the weights back at once. Fails with ``LoadFailed`` (FAILED_PRECONDITION; a
device that is not there is UNAVAILABLE), with INVALID_ARGUMENT when a request's tensors are at
fault.
"""

from __future__ import annotations

import io
import re
import warnings
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
from mesh.runtimes import tabular
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.pytorch_archive import PytorchArchive, content_bytes, open_archive
from mesh.runtimes.settings import RuntimeSettings

PLATFORM: Final = "pytorch"
SCRIPT_SUFFIXES: Final = (".pt", ".pth")
EXPORT_SUFFIX: Final = ".pt2"
OUTPUT: Final = "OUTPUT__"

_CONTENT_FACTOR: Final = 1.2
# What a module of a few layers takes beside its weights; measured 0.2 to 0.6 MB.
_MODULE_BYTES: Final = 1024 * 1024
_INDEXED: Final = re.compile(r".*__(\d{1,4})")
_DEVICE: Final = re.compile(r"cpu|cuda(?::(\d{1,3}))?")

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


@dataclass(frozen=True, slots=True)
class Program:
    """``run`` takes the inputs' tensors in the order of ``order`` and answers (name, value) for
    each output, None for the name where the place gives it."""

    module: Any
    order: tuple[str, ...]
    run: Callable[[list[Any]], list[tuple[str | None, Any]]]
    metadata: ModelMetadata


class PytorchModel:
    """A module on its device."""

    __slots__ = (
        *("_bf16", "_device", "_heap", "_module", "_order", "_places", "_run", "_stated", "_torch"),
        *("metadata", "size_bytes"),
    )

    def __init__(
        self, torch: Any, program: Program, size_bytes: int, device: str, heap: NativeHeap
    ) -> None:
        self.metadata = program.metadata
        self.size_bytes = size_bytes
        self._torch = torch
        self._module = program.module
        self._run = program.run
        self._order = program.order
        self._device = device
        self._heap = heap
        self._bf16 = frozenset(s.name for s in self.metadata.inputs if s.datatype == "BF16")
        self._stated = tuple(spec.name for spec in self.metadata.outputs)
        self._places = _places(self._stated)

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        torch = self._torch
        try:
            with torch.inference_mode():
                found = self._run([self._in(name, inputs[name]) for name in self._order])
        except MeshError:
            raise
        except Exception as error:
            raise _run_error(torch, error) from None
        values = {
            name or self._places.get(index, f"{OUTPUT}{index}"): value
            for index, (name, value) in enumerate(found)
        }
        wanted = outputs or self._stated or tuple(values)
        missing = [name for name in wanted if name not in values]
        if missing:
            raise Internal(
                f"the model answered without {missing[0]!r}, which it declares; "
                f"it answered {list(values)}"
            )
        return [self._out(name, values[name]) for name in wanted]

    def _in(self, name: str, array: Array) -> Any:
        torch = self._torch
        if not array.flags.writeable or not array.flags.c_contiguous:
            # torch takes no read-only views; and a module may work in place.
            array = np.array(array, order="C")
        tensor = torch.from_numpy(array)
        if name in self._bf16:
            tensor = tensor.view(torch.bfloat16)
        return tensor if self._device == "cpu" else tensor.to(self._device)

    def _out(self, name: str, value: Any) -> Tensor:
        torch = self._torch
        try:
            if not isinstance(value, torch.Tensor):
                value = torch.as_tensor(value)
            kind = _DATATYPE_BY_TORCH.get(str(value.dtype))
            if kind is not None:
                value = value.detach().cpu().contiguous()
                if kind == "BF16":
                    return Tensor(name, kind, value.view(torch.int16).numpy().view(np.uint16))
                return Tensor(name, kind, value.numpy())
        except (RuntimeError, TypeError, ValueError) as error:
            raise Internal(
                f"output {name!r} is a {type(value).__name__} that is no plain tensor: "
                f"{_cause(error)}"
            ) from None
        raise Internal(f"output {name!r} is a {value.dtype}, which no datatype carries")

    def unload(self) -> None:
        module, self._module, self._run = self._module, None, _unloaded
        # An exported module refers to itself: its weights would wait for the next full collection.
        for holder in _modules(module):
            _drop_tensors(holder, self._torch)
        del module
        if self._device != "cpu":
            self._torch.cuda.empty_cache()
        self._heap.released(self.size_bytes)


class PytorchRuntime:
    """Loads ``model.pt2``, ``model.pt``, or a folder's only such file."""

    model_types = ("pytorch",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap
        self._prepared = False

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _predicted_bytes(content_bytes(_file(spec), spec))

    def load(self, spec: ModelSpec) -> PytorchModel:
        path = _file(spec)
        tabular.file_bytes(path, spec)
        archive = open_archive(path, spec)
        import torch

        device = _device(torch, self._settings.device, spec)
        self._prepare(torch, spec)
        on_gpu = device != "cpu"
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        with self._heap.measure() as growth:
            try:
                load = _exported if archive.exported else _scripted
                program = load(torch, path, spec, device, archive)
            except MeshError:
                raise
            except Exception as error:
                raise _load_error(torch, path, spec, error) from None
        held = max(_held_bytes(program.module), archive.tensor_bytes)
        if on_gpu:
            grown: int | None = torch.cuda.memory_allocated(device) - before
        else:
            grown = growth.bytes_
        predicted = _predicted_bytes(archive.content_bytes)
        # Weights count fully, also where they are shared or mapped; other loads do not.
        size_bytes = min(max(grown or predicted, held + _MODULE_BYTES // 4), 2 * predicted)
        return PytorchModel(torch, program, size_bytes, device, self._heap)

    def _prepare(self, torch: Any, spec: ModelSpec) -> None:
        if self._prepared:
            return
        self._prepared = True
        torch.set_num_threads(spec.options.threads or self._settings.intra_op_threads)
        torch._C._jit_set_profiling_executor(False)
        # It warns of TorchScript's age at each load.
        warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated")


def _file(spec: ModelSpec) -> Path:
    if spec.options.file and not spec.path.is_file():
        return spec.path / spec.options.file
    return tabular.only_file(spec, (EXPORT_SUFFIX, *SCRIPT_SUFFIXES))


def _device(torch: Any, name: str, spec: ModelSpec) -> str:
    """The device that the operator chose; raises LoadFailed when there is none such."""
    form = _DEVICE.fullmatch(name)
    if form is None:
        raise LoadFailed(
            f"model {spec.model_id!r}: the device {name!r} (--device) is none of cpu, cuda, cuda:N",
            code=Code.UNAVAILABLE,
        )
    if name == "cpu":
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(form[1] or 0) >= count:
        raise LoadFailed(
            f"model {spec.model_id!r}: this instance was told to use {name} (--device), and "
            f"PyTorch finds {count or 'no'} CUDA devices",
            code=Code.UNAVAILABLE,
        )
    return name


def _scripted(
    torch: Any, path: Path, spec: ModelSpec, device: str, archive: PytorchArchive
) -> Program:
    module = torch.jit.load(str(path), map_location=device)
    module.eval()
    arguments = module.forward.schema.arguments[1:]
    needed = [one.name for one in arguments if not one.has_default_value()]
    tensors = [one.name for one in arguments if _tensor_type(one.type)]
    for one in arguments:
        if one.name in needed and one.name not in tensors:
            raise LoadFailed(
                f"model {spec.model_id!r}: argument {one.name!r} of forward is a {one.type}; only "
                "tensors can be sent. Give it a default, or wrap the model"
            )
    names = [one.name for one in arguments]
    order, inputs = _arranged(names, needed, tensors, spec)
    first = names[: len(order)]
    leading = list(order) == first

    def run(values: list[Any]) -> list[tuple[str | None, Any]]:
        if leading:
            return _named(module(*values))
        return _named(module(**dict(zip(order, values, strict=True))))

    outputs = spec.options.outputs or _script_outputs(module.forward.schema.returns[0].type)
    stated = tuple(one.name for one in inputs)
    return Program(module, stated, run, ModelMetadata(PLATFORM, (), inputs, outputs))


def _tensor_type(kind: Any) -> bool:
    return str(kind) in ("Tensor", "Optional[Tensor]")


def _script_outputs(kind: Any) -> tuple[TensorSpec, ...]:
    """As many as the signature tells; none for a dict or a list, whose content it does not."""
    name = kind.kind()
    if name in ("DictType", "ListType"):
        return ()
    count = len(kind.elements()) if name == "TupleType" else 1
    return tuple(TensorSpec(f"{OUTPUT}{n}", "FP32", (), any_rank=True) for n in range(count))


def _arranged(
    names: Sequence[str], needed: Sequence[str], tensors: Sequence[str], spec: ModelSpec
) -> tuple[list[str], tuple[TensorSpec, ...]]:
    """(arguments to give, in the order of ``names``; the inputs, in the same order)"""
    stated = spec.options.inputs
    if not stated:
        found = tuple(TensorSpec(name, "FP32", (), any_rank=True) for name in needed)
        return list(needed), found
    places: dict[int, TensorSpec] = {}
    for one in stated:
        indexed = _INDEXED.fullmatch(one.name)
        if one.name in names:
            places.setdefault(names.index(one.name), one)
        elif indexed is not None:
            places.setdefault(int(indexed[1]), one)
    given = [names[place] for place in sorted(places) if place < len(names)]
    fits = len(given) == len(stated) and {*needed} <= {*given} <= {*tensors}
    if not fits:
        raise LoadFailed(
            f"model {spec.model_id!r}: {spec.options.source} names the inputs "
            f"{[one.name for one in stated]}; the model's arguments are {list(names)}. Name them "
            "so, or INPUT__0, INPUT__1 ... by their place"
        )
    inputs = tuple(places[place] for place in sorted(places))
    for one in inputs:
        if one.datatype == "BYTES":
            raise LoadFailed(
                f"model {spec.model_id!r}: {spec.options.source} says that input {one.name!r} is "
                "text (BYTES); PyTorch has no tensors of text"
            )
    return given, inputs


def _exported(
    torch: Any, path: Path, spec: ModelSpec, device: str, archive: PytorchArchive
) -> Program:
    for sample in archive.samples:
        # The loader opens them too, and where this fails it would run what they say.
        try:
            torch.load(io.BytesIO(sample), weights_only=True)
        except Exception:
            raise LoadFailed(
                f"model {spec.model_id!r}: {path.name} has example inputs that are not plain "
                "tensors, but objects with code; export it with tensors"
            ) from None
    with path.open("rb") as file:
        program = torch.export.load(str(path) if path.suffix == EXPORT_SUFFIX else file)
    from torch.export.passes import move_to_device_pass

    # The graph makes tensors on the device that it was exported on.
    program = move_to_device_pass(program, device)
    module = program.module()
    nodes = {node.name: node for node in program.graph.nodes}
    slots = program.graph_signature.user_inputs  # the flat arguments: names, and constants
    names = [name for name in slots if isinstance(name, str)]
    inputs = tuple(_graph_spec(name, name, nodes, spec) for name in names)
    if spec.options.inputs:
        _, inputs = _arranged(names, names, names, spec)
    answers = [str(name) for name in _answer_names(program.call_spec.out_spec)]
    outputs = tuple(
        _graph_spec(answers[index], node, nodes, spec)
        for index, node in enumerate(program.graph_signature.user_outputs)
        if isinstance(node, str)
    )
    pytree, in_spec = torch.utils._pytree, program.call_spec.in_spec

    def run(values: list[Any]) -> list[tuple[str | None, Any]]:
        given = iter(values)
        flat = [next(given) if isinstance(slot, str) else slot for slot in slots]
        args, kwargs = pytree.tree_unflatten(flat, in_spec)
        found = module(*args, **kwargs)
        if isinstance(found, torch.Tensor):
            return [(None, found)]
        leaves = pytree.tree_leaves(found)
        keyed = isinstance(found, Mapping) and len(found) == len(leaves)
        return [(answers[i] if keyed else None, leaf) for i, leaf in enumerate(leaves)]

    metadata = ModelMetadata(PLATFORM, (), inputs, spec.options.outputs or outputs)
    return Program(module, tuple(one.name for one in inputs), run, metadata)


def _answer_names(out_spec: Any) -> list[str]:
    """The keys of a flat dict, else by place."""
    children = out_spec.children()
    if out_spec.type is dict and all(child.is_leaf() for child in children):
        return list(out_spec.context)
    return [f"{OUTPUT}{index}" for index in range(out_spec.num_leaves)]


def _graph_spec(name: str, node_name: str, nodes: Mapping[str, Any], spec: ModelSpec) -> TensorSpec:
    value = nodes[node_name].meta.get("val")
    dtype = getattr(value, "dtype", None)
    kind = _DATATYPE_BY_TORCH.get(str(dtype))
    if value is None or kind not in DATATYPES:
        raise LoadFailed(
            f"model {spec.model_id!r}: {name!r} is a {dtype or type(value).__name__}, which the "
            f"Open Inference Protocol cannot carry; it can {', '.join(DATATYPES)}"
        )
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in value.shape)
    return TensorSpec(name, kind, shape)


def _named(found: Any) -> list[tuple[str | None, Any]]:
    if isinstance(found, Mapping):
        return [(str(name), value) for name, value in found.items()]
    return [(None, value) for value in (found if isinstance(found, list | tuple) else (found,))]


def _places(stated: Sequence[str]) -> dict[int, str]:
    """What the answer at each place is called: ``NAME__<n>`` says it; others are in order."""
    indexed = [_INDEXED.fullmatch(name) for name in stated]
    if all(indexed):
        return {int(one[1]): one[0] for one in indexed if one is not None}
    return dict(enumerate(stated))


def _modules(module: Any) -> list[Any]:
    # A scripted module hands out views of C++ objects, which go with it.
    return [] if module is None or hasattr(module, "_c") else list(module.modules())


def _drop_tensors(holder: Any, torch: Any) -> None:
    held = vars(holder)
    for name in ("_parameters", "_buffers"):
        held.get(name, {}).clear()
    for name in [name for name, value in held.items() if isinstance(value, torch.Tensor)]:
        del held[name]


def _held_bytes(module: Any) -> int:
    seen: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _predicted_bytes(content: int) -> int:
    return round(content * _CONTENT_FACTOR) + _MODULE_BYTES


def _unloaded(values: list[Any]) -> list[tuple[str | None, Any]]:
    raise Unavailable("the model was unloaded; try again")


def _load_error(torch: Any, path: Path, spec: ModelSpec, error: Exception) -> LoadFailed:
    if _out_of_memory(torch, error):
        return LoadFailed(
            f"model {spec.model_id!r}: out of memory while loading {path.name}",
            code=Code.UNAVAILABLE,
        )
    # The client must not learn where on the disk the artifact lies.
    cause = _cause(error).replace(str(path), path.name).replace(str(path.parent), ".")
    return LoadFailed(f"model {spec.model_id!r}: PyTorch cannot load {path.name}: {cause}")


def _run_error(torch: Any, error: Exception) -> MeshError:
    cause = _cause(error)
    if _out_of_memory(torch, error):
        return ResourceExhausted(f"out of memory while running the model: {cause}")
    if "CUDA error" in cause:
        return Internal(f"PyTorch failed: {cause}")
    # An AssertionError is the guard of an exported program: a size that it was not exported for.
    if isinstance(error, RuntimeError | ValueError | TypeError | IndexError | AssertionError):
        return InvalidArgument(f"PyTorch refused the input: {cause}")
    return Internal(f"PyTorch failed: {cause}")


def _out_of_memory(torch: Any, error: Exception) -> bool:
    return (
        isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
        or "can't allocate memory" in str(error)
        or "bad_alloc" in str(error)
    )


def _cause(error: Exception) -> str:
    """The line that says what is wrong: TorchScript's come with the trace of the model's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("RuntimeError:")]
    return (told[-1] if told else lines[0] if lines else type(error).__name__)[:500]
