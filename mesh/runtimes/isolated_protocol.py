"""What a serving pod and its worker processes say to each other: paths, and JSON in plain messages.

Both sides are of one version and one machine, so there is no schema beside these functions. The
pod orders workers from a fork server over a socket pair, one JSON object a line; a worker is then
asked over the mesh's own wire. Inference itself is not in here: it is the pod's own protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import orjson

from mesh.core.batching import Wished
from mesh.core.policy import Policy
from mesh.runtimes.api import ModelMetadata, ModelSpec, TensorSpec
from mesh.runtimes.settings import RuntimeSettings

SERVICE: Final = "/mesh.worker.v1.Worker/"
LOAD_PATH: Final = SERVICE + "Load"
PING_PATH: Final = SERVICE + "Ping"
TERMS_PATH: Final = SERVICE + "Terms"

# The module that the pod starts; it is named here only, because the pod must not import it.
FORK_SERVER_MODULE: Final = "mesh.worker.zygote"
# A worker's socket in its folder: the whole path must stay below 108 bytes.
SOCKET_NAME: Final = "s"


@dataclass(frozen=True, slots=True)
class Order:
    """One worker. ``folder`` is its own: its socket, its working directory, its TMPDIR."""

    number: int
    folder: Path
    settings: RuntimeSettings
    threads: int  # that run inference at once
    max_message_bytes: int

    @property
    def socket_path(self) -> str:
        return str(self.folder / SOCKET_NAME)

    def encode(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    @staticmethod
    def decode(said: Mapping[str, Any]) -> Order:
        return Order(
            number=said["number"],
            folder=Path(said["folder"]),
            settings=_settings(said["settings"]),
            threads=said["threads"],
            max_message_bytes=said["max_message_bytes"],
        )


def _settings(said: Mapping[str, Any]) -> RuntimeSettings:
    known = {field.name for field in fields(RuntimeSettings)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in said.items()
        if name in known
    }
    return RuntimeSettings(**values)


def line(said: Mapping[str, Any]) -> bytes:
    """One message on the fork server's socket."""
    return orjson.dumps(said, option=orjson.OPT_APPEND_NEWLINE)


# ---- Load ----


def load_request(spec: ModelSpec) -> bytes:
    """The artifact is laid out again there, so its options need not go along."""
    return orjson.dumps(
        {
            "model_id": spec.model_id,
            "model_type": spec.model_type,
            "path": str(spec.path),
            "parameters": dict(spec.parameters),
        }
    )


def load_spec(message: bytes) -> ModelSpec:
    said = orjson.loads(message)
    return ModelSpec(
        said["model_id"], said["model_type"], Path(said["path"]), parameters=said["parameters"]
    )


def load_reply(metadata: ModelMetadata) -> bytes:
    return orjson.dumps(asdict(metadata))


def loaded_metadata(message: bytes) -> ModelMetadata:
    said = orjson.loads(message)
    return ModelMetadata(
        platform=said["platform"],
        versions=tuple(said["versions"]),
        inputs=_tensors(said["inputs"]),
        outputs=_tensors(said["outputs"]),
        accepts_any_input=said["accepts_any_input"],
    )


def _tensors(said: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(one["name"], one["datatype"], tuple(one["shape"]), one["any_rank"])
        for one in said
    )


# ---- Terms ----


def terms_message(record: Wished, policy: Policy) -> bytes:
    """What the model's record says of joining requests, and the thresholds that hold now."""
    return orjson.dumps({"record": asdict(record), "policy": asdict(policy)})


def terms_told(message: bytes) -> tuple[Wished, Policy]:
    said = orjson.loads(message)
    return Wished(**said["record"]), Policy(**said["policy"])


# ---- Ping ----


@dataclass(frozen=True, slots=True)
class Pulse:
    """``running``: inferences inside the model now; ``oldest_ms``: since the first of them began,
    0 when there is none."""

    running: int
    oldest_ms: int

    def encode(self) -> bytes:
        return orjson.dumps(asdict(self))

    @staticmethod
    def decode(message: bytes) -> Pulse:
        return Pulse(**orjson.loads(message))
