"""What the serving pod asks of a runtime: the thing that executes one family of model formats.

An in-process runtime is one file in this package, imported when its first model comes. An
external runtime (``mmesh.ModelRuntime``) and an isolated worker process will stand behind the
same two protocols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from mesh.core.errors import Unavailable


class ModelLost(Unavailable):
    """Raised by ``infer``: the runtime does not have the model any more (its process restarted, a
    device was reset). The copy is dropped, and the request goes to one that is loaded anew."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. ``shape`` has -1 for a free axis; ``datatype`` is OIP's (``FP32``).

    ``any_rank``: the model does not say how many axes there are; ``shape`` then means nothing.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    any_rank: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a runtime needs to load a model: the artifact as it lies on disk, and its type."""

    model_id: str
    model_type: str
    path: Path  # a file or a folder
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """``accepts_any_input``: ``inputs`` is only what to suggest to clients; the model takes
    inputs of any name, datatype and shape, and checks them itself."""

    platform: str
    versions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    accepts_any_input: bool = False


# BYTES tensors are arrays of dtype object that hold ``bytes``; BF16 is carried as uint16 with
# datatype "BF16" because numpy has none.
Array = npt.NDArray[Any]


class Tensor(NamedTuple):
    """One output tensor; a tuple because it is made for every answer (a third of the cost)."""

    name: str
    datatype: str
    data: Array  # its shape is the tensor's shape


class LoadedModel(Protocol):
    """A model in memory. ``infer`` may be called from several threads at once."""

    @property
    def metadata(self) -> ModelMetadata: ...

    @property
    def size_bytes(self) -> int:
        """Measured, or the best estimate that the runtime has; > 0."""
        ...

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        """Run once. ``inputs`` are checked against the metadata already (names, datatypes,
        shapes) unless it ``accepts_any_input``. They may be read-only views of the request.

        ``outputs`` names what is wanted; empty is all. Raises ``MeshError`` (INVALID_ARGUMENT
        when the input's content is at fault, ``ModelLost`` when the model is not there any more).
        """
        ...

    def unload(self) -> None:
        """Let go of all memory. Called once, when no request is inside."""
        ...


class Runtime(Protocol):
    """One family of formats. Methods run in a worker thread, never in the event loop."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """The ``modelFormat`` names that it answers to."""
        ...

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        """Near instant, conservative, from the files on disk alone."""
        ...

    def load(self, spec: ModelSpec) -> LoadedModel:
        """Raises ``LoadFailed`` with FAILED_PRECONDITION when the artifact is at fault."""
        ...
