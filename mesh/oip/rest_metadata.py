"""The JSON bodies of the v2 and v1 calls that are not inference. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from mesh.runtimes.api import ModelMetadata, TensorSpec


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One model of the repository index; ``state`` is UNKNOWN, READY, UNAVAILABLE, LOADING or
    UNLOADING."""

    name: str
    state: str
    version: str = ""
    reason: str = ""


def server_metadata(name: str, version: str, extensions: Sequence[str]) -> bytes:
    return orjson.dumps({"name": name, "version": version, "extensions": list(extensions)})


def model_metadata(name: str, metadata: ModelMetadata) -> bytes:
    return orjson.dumps(
        {
            "name": name,
            "versions": list(metadata.versions),
            "platform": metadata.platform,
            "inputs": [_tensor(spec) for spec in metadata.inputs],
            "outputs": [_tensor(spec) for spec in metadata.outputs],
        }
    )


def repository_index(entries: Iterable[IndexEntry]) -> bytes:
    return orjson.dumps(
        [
            {
                "name": entry.name,
                "version": entry.version,
                "state": entry.state,
                "reason": entry.reason,
            }
            for entry in entries
        ]
    )


def server_live(live: bool) -> bytes:
    return orjson.dumps({"live": live})


def server_ready(ready: bool) -> bytes:
    return orjson.dumps({"ready": ready})


def model_ready(name: str, ready: bool) -> bytes:
    return orjson.dumps({"name": name, "ready": ready})


def v1_models(names: Iterable[str]) -> bytes:
    return orjson.dumps({"models": list(names)})


def v1_model(name: str, ready: bool) -> bytes:
    # KServe's v1 writes the flag as a string in older releases and as a boolean since 0.10.
    return orjson.dumps({"name": name, "ready": ready})


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    # An unknown rank has no form in the protocol; one free axis is what Triton shows.
    shape = [-1] if spec.any_rank else list(spec.shape)
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape}
