"""What the serving pod asks of a runtime: the thing that executes one family of model formats.

An in-process runtime is one file in this package, imported when its first model comes. An
external runtime (``mmesh.ModelRuntime``) and an isolated worker process will stand behind the
same two protocols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import numpy.typing as npt

from mesh.core.batching import Wished
from mesh.core.errors import MeshError, Unavailable
from mesh.core.policy import Policy
from mesh.wire.client import Channel, RpcError


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
class WarmUp:
    """One request that is run before a model counts as loaded, ``count`` times. ``inputs``: every
    axis given; zeros, or the content of the file in ``data`` (by the input's name), which is as in
    ``raw_input_contents``."""

    inputs: tuple[TensorSpec, ...]
    count: int = 1
    data: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What the model's own ``config.pbtxt`` or ``model-settings.json`` says of it.

    Everything is optional: None and empty where the file is silent or not there. Datatypes are
    OIP's. ``inputs`` and ``outputs`` have full shapes: the batch axis (-1) is their first where
    ``max_batch_size`` is above 0.
    """

    source: str = ""  # name of the file that says it, for messages
    format: str = ""  # one of our formats, from platform, backend or implementation
    file: str = ""  # name of the model's file or folder inside its version
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int | None = None  # rows; 0: never batch
    max_latency_us: int | None = None  # a request may wait so long for others
    max_concurrency: int | None = None  # inferences at once
    threads: int | None = None  # of one inference
    warm_up: tuple[WarmUp, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # what is said in vain, each with its field


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a runtime needs to load one version of a model: its files as they lie on disk, its
    format, and what it says of itself."""

    model_id: str
    model_type: str
    path: Path  # a file or a folder
    parameters: Mapping[str, Any] = field(default_factory=dict)
    options: ModelOptions = ModelOptions()


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


class RemoteModel(Protocol):
    """A model in another process. Requests go there unread, through ``channel``, from the event
    loop; the copy's id (``mm-model-id``) and the client's metadata go along.

    All methods but ``unload`` are called in the event loop and must not block.
    """

    @property
    def metadata(self) -> ModelMetadata | None:
        """None: the process is asked itself (ModelMetadata is carried there like any call)."""
        ...

    @property
    def internal(self) -> bool:
        """A process of ours: it is given the mesh's own headers (``mesh-*``, ``mm-vmodel-id``), and
        what it says of a refusal (``mesh-error``) is passed on."""
        ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def channel(self) -> Channel: ...

    @property
    def max_concurrency(self) -> int:
        """Requests at once that it takes; 0: it does not say."""
        ...

    def admit(self, path: str) -> MeshError | None:
        """Why a call of this method (``/pkg.Service/Method``) is refused, or None."""
        ...

    def request(self, path: str, message: bytes) -> bytes:
        """The message as the process wants it (the model's id put in). Raises MeshError."""
        ...

    def reply(self, path: str, message: bytes, client_name: str) -> bytes:
        """The answer as the client wants it: under the name that it used."""
        ...

    def error(self, path: str, error: RpcError) -> MeshError:
        """What a failed call means: ``ModelLost`` when the model is not there any more, a crash
        with its cause, or the model's own error as it came."""
        ...

    def unload(self) -> None:
        """As ``LoadedModel.unload``; in a worker thread."""
        ...


@dataclass(frozen=True, slots=True)
class ProcessEnds:
    """How often a model's process has ended while it was wanted, and how the last time."""

    count: int = 0
    last_at_ms: int = 0  # since the epoch
    last_cause: str = ""


@runtime_checkable
class InternalModel(Protocol):
    """A remote model whose process is ours (``internal``): it runs requests as the pod does."""

    @property
    def ends(self) -> ProcessEnds: ...

    def use_terms(self, record: Wished, policy: Policy) -> None:
        """What the record says of joining requests, and the thresholds, from now on."""
        ...


class VersionedModel:
    """The named versions of one model, loaded together; ``latest`` answers when none is asked for.

    ``versions`` are by name, the latest first; at least one, named "" where the artifact has no
    versions. ``options``: what its own file says of all of them. Not itself asked to infer: the
    serving pod keeps a servable for each version.
    """

    __slots__ = ("latest", "options", "versions")

    def __init__(
        self, versions: Mapping[str, LoadedModel], options: ModelOptions = ModelOptions()
    ) -> None:
        self.versions = dict(versions)
        self.options = options
        self.latest = next(iter(self.versions.values()))

    @property
    def metadata(self) -> ModelMetadata:
        return self.latest.metadata

    @property
    def size_bytes(self) -> int:
        return sum(model.size_bytes for model in self.versions.values())

    def unload(self) -> None:
        for model in self.versions.values():
            model.unload()


AnyModel = LoadedModel | RemoteModel | VersionedModel


def is_remote(model: AnyModel) -> TypeGuard[RemoteModel]:
    return hasattr(model, "channel")


class Runtime(Protocol):
    """One family of formats. Methods run in a worker thread, never in the event loop."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """The ``modelFormat`` names that it answers to."""
        ...

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        """Near instant, conservative, from the files on disk alone."""
        ...

    def load(self, spec: ModelSpec) -> AnyModel:
        """Raises ``LoadFailed`` with FAILED_PRECONDITION when the artifact is at fault."""
        ...


@runtime_checkable
class CancellableRuntime(Protocol):
    """A runtime in another process: a load there can be called off."""

    def cancel_load(self, model_id: str) -> None:
        """Called in the event loop; the load then fails, or is unloaded when it comes."""
        ...
