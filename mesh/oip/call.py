"""One inference request in the form that runtimes take, whatever way it came in.

gRPC and REST decode into an ``InferCall`` and encode the tensors that come back by what its head
says. Owns the checks of a request against a model's metadata. Pure. Everything wrong with a
request is an ``InvalidArgument`` that names the input, what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from mesh.core.errors import Internal, InvalidArgument, NotFound, Unimplemented
from mesh.oip.datatypes import Array, DataType
from mesh.runtimes.api import ModelMetadata, Tensor, TensorSpec

ParameterValue = bool | int | float | str

INPUTS_MAX: Final = 1024

# Parameters of a tensor that point at memory shared with the client.
_SHARED_MEMORY: Final = "shared_memory_region"


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the request asks for by name.

    ``classification`` above 0 asks for that many best classes instead of the tensor. ``binary``
    is REST's ``binary_data``: None leaves it to the request's ``binary_data_output``.
    """

    name: str
    classification: int = 0
    binary: bool | None = None


@dataclass(frozen=True, slots=True)
class InferHead:
    """What a request says apart from its tensors and its id; shared by equal requests.

    ``raw`` is the form of the reply: gRPC's raw_output_contents, REST's binary tensors.
    ``output_names`` are those of ``outputs``; empty means every output. ``rows`` is ``rows_in``
    of the tensors, which equal requests share as well; -1: nobody has looked.
    """

    model_name: str = ""
    model_version: str = ""
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    outputs: tuple[RequestedOutput, ...] = ()
    output_names: tuple[str, ...] = ()
    raw: bool = True
    classified: bool = False
    rows: int = -1


class InferCall(NamedTuple):
    """A decoded request: ``model.infer(call.inputs, call.outputs, call.parameters)``."""

    inputs: dict[str, Array]
    id: str
    head: InferHead

    @property
    def model_name(self) -> str:
        return self.head.model_name

    @property
    def model_version(self) -> str:
        return self.head.model_version

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.head.output_names

    @property
    def parameters(self) -> Mapping[str, ParameterValue]:
        return self.head.parameters


def rows_in(inputs: Mapping[str, Array], metadata: ModelMetadata) -> int:
    """The first axis of all inputs, where it is the same; 0: it is not, or none can be told."""
    if metadata.accepts_any_input:
        # Of another form than is advertised: a flat array may be one row, or many.
        ranks = [len(spec.shape) for spec in metadata.inputs]
        if [array.ndim for array in inputs.values()] != ranks:
            return 0
    rows = -1
    for array in inputs.values():
        shape = array.shape
        if not shape or rows not in (-1, shape[0]):
            return 0
        rows = shape[0]
    return max(rows, 0)


def rows_of(call: InferCall, metadata: ModelMetadata) -> int:
    """Rows of a request; 0: it cannot be joined with others."""
    rows = call.head.rows
    return rows if rows >= 0 else rows_in(call.inputs, metadata)


def check_names(found: Sequence[str], metadata: ModelMetadata) -> None:
    """Every input is there once and none is unknown."""
    if len(found) > INPUTS_MAX:
        raise InvalidArgument(f"the request has {len(found)} inputs; at most {INPUTS_MAX} are")
    seen = set(found)
    if len(seen) != len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise InvalidArgument(f"input {twice!r} is given more than once")
    if metadata.accepts_any_input:
        if not found:
            raise InvalidArgument("the request has no input; the model takes one")
        return
    known = {spec.name for spec in metadata.inputs}
    for name in found:
        if name not in known:
            raise InvalidArgument(
                f"the model has no input {name!r}; its inputs are {_describe(metadata.inputs)}"
            )
    for spec in metadata.inputs:
        if spec.name not in seen:
            raise InvalidArgument(
                f"input {spec.name!r} ({_describe_one(spec)}) is missing; "
                f"the request has {sorted(seen)}"
            )


def check_tensor(name: str, kind: DataType, shape: Sequence[int], metadata: ModelMetadata) -> None:
    """Datatype, rank and fixed axes of an input whose name ``check_names`` has let pass."""
    if metadata.accepts_any_input:
        if kind.name == "BF16":  # its bits would be taken for whole numbers
            raise InvalidArgument(
                f"input {name!r} is BF16, which the model does not declare; send FP32"
            )
        return
    spec = next(spec for spec in metadata.inputs if spec.name == name)
    if kind.name != spec.datatype:
        raise InvalidArgument(
            f"input {name!r} must have the datatype {spec.datatype}; found {kind.name}"
        )
    if spec.any_rank:
        return
    fits = len(shape) == len(spec.shape) and all(
        wanted in (-1, found) for wanted, found in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        raise InvalidArgument(
            f"input {name!r} must have the shape {list(spec.shape)} (-1 is any size); "
            f"found {list(shape)}"
        )


def versions_of(metadata: ModelMetadata) -> tuple[str, ...]:
    """An artifact that names no version is version 1: clients read the version as a number."""
    return metadata.versions or ("1",)


def check_version(version: str, metadata: ModelMetadata) -> None:
    versions = versions_of(metadata)
    if version and version not in versions:
        raise NotFound(f"the model has no version {version!r}; it has {list(versions)}")


def refuse_shared_memory(parameters: Mapping[str, object], of: str) -> None:
    if _SHARED_MEMORY in parameters:
        raise Unimplemented(
            f"{of} points at shared memory, which this server does not offer: "
            f"send the tensor's contents"
        )


def requested_outputs(
    outputs: Sequence[RequestedOutput], metadata: ModelMetadata
) -> tuple[RequestedOutput, ...]:
    """Checked: each is an output of the model and asked for once. A model that says nothing of
    its tensors is left to say what is wrong itself."""
    known = {spec.name for spec in metadata.outputs}
    seen: set[str] = set()
    for output in outputs:
        if output.name not in known and (known or not metadata.accepts_any_input):
            raise InvalidArgument(
                f"the model has no output {output.name!r}; "
                f"its outputs are {_describe(metadata.outputs)}"
            )
        if output.name in seen:
            raise InvalidArgument(f"output {output.name!r} is asked for more than once")
        seen.add(output.name)
    return tuple(outputs)


def classification_count(value: object, output: str) -> int:
    """The ``classification`` parameter of a requested output."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidArgument(
            f"output {output!r}: the parameter 'classification' must be a number of classes, "
            f"not {value!r}"
        )
    return value


def finish_outputs(tensors: Sequence[Tensor], head: InferHead) -> list[Tensor]:
    """The tensors as the request wants them: its subset, in its order, classified where asked."""
    if not head.outputs:
        return list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    finished: list[Tensor] = []
    for output in head.outputs:
        tensor = by_name.get(output.name)
        if tensor is None:
            raise Internal(f"the runtime returned no output {output.name!r}, which it declares")
        finished.append(
            classify(tensor, output.classification) if output.classification else tensor
        )
    return finished


def classify(tensor: Tensor, count: int) -> Tensor:
    """Triton's classification extension: the best classes as BYTES ``value:index``.

    A tensor of rank 1 is one distribution; otherwise the first axis is the batch.
    """
    scores = tensor.data
    if scores.dtype.kind not in "fiu" or tensor.datatype == "BF16":
        raise InvalidArgument(
            f"output {tensor.name!r} is {tensor.datatype}; "
            f"the parameter 'classification' needs numbers"
        )
    batch = 1 if scores.ndim < 2 else scores.shape[0]
    rows = scores.reshape(batch, -1) if scores.size else scores.reshape(batch, 0)
    kept = min(count, rows.shape[1])
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :kept]
    labels = np.empty((batch, kept), dtype=object)
    for row in range(batch):
        for column in range(kept):
            index = int(best[row, column])
            labels[row, column] = f"{float(rows[row, index]):f}:{index}".encode()
    return Tensor(tensor.name, "BYTES", labels if scores.ndim >= 2 else labels[0])


def _describe_one(spec: TensorSpec) -> str:
    return f"{spec.datatype} {'of any shape' if spec.any_rank else list(spec.shape)}"


def _describe(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name!r} ({_describe_one(spec)})" for spec in specs) or "none"
