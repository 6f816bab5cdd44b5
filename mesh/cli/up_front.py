"""The client's side of `mesh up`: what it applies by, and the request that a person can paste.

It goes through the router's public address as any client would.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mesh.cli.connection import Connection, Target
from mesh.cli.exits import CommandError, Exit
from mesh.cli.quantities import format_size
from mesh.core.errors import InvalidArgument
from mesh.folder_sync import Applied, Applier, SyncRefused, SyncUnavailable
from mesh.samples import EXAMPLES
from mesh.serving_runtime import KINDS as RUNTIME_KINDS
from mesh.storage_folder import KIND as SECRET
from mesh.storage_folder import NAME, applied_secret, is_secret, write_folder
from mesh.up.settings import Addresses
from protos import oip_pb2

_METADATA: Final = "/inference.GRPCInferenceService/ModelMetadata"
# Registering is a few writes in etcd.
_APPLY_TIMEOUT_S: Final = 30.0
# A model's metadata may mean to load it first; a longer wait than this holds up the ready line.
_METADATA_TIMEOUT_S: Final = 20.0
# A request that does not fit on a screen is not for pasting.
_ELEMENTS_MAX: Final = 64
_EXAMPLE_FIELDS: Final = frozenset({"model", "path", "request", "response"})


class MeshApplier:
    """``mesh.folder_sync.Applier`` over one connection that is opened when first needed; a secret
    is written into ``storage_config``."""

    def __init__(self, target: Target, storage_config: Path) -> None:
        self._target = target
        self._storage_config = storage_config
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def apply(self, manifest_json: str) -> Applied:
        resource = json.loads(manifest_json)
        if is_secret(resource):
            return Applied(f"{SECRET}/{NAME}", self._keep_secret(resource))
        try:
            reply = self._connect().apply(manifest_json, load_now=False, timeout_s=_APPLY_TIMEOUT_S)
        except CommandError as error:
            raise _sync_error(error) from error
        name = reply.name if reply.model_id else f"{resource['kind']}/{reply.name}"
        return Applied(name, reply.action, tuple(reply.warnings))

    def delete(self, name: str) -> None:
        kind, _, own_name = name.partition("/")
        try:
            if kind == SECRET:
                self._write_secret({})
            elif kind in RUNTIME_KINDS:
                self._connect().delete_runtime(own_name, kind, timeout_s=_APPLY_TIMEOUT_S)
            elif kind != "InferenceGraph":  # which nobody keeps
                self._connect().delete(name, timeout_s=_APPLY_TIMEOUT_S)
        except CommandError as error:
            raise _sync_error(error) from error

    def _keep_secret(self, resource: Mapping[str, Any]) -> str:
        try:
            action = self._write_secret(applied_secret(resource))
        except InvalidArgument as error:
            raise SyncRefused(error.message) from error
        if action != "unchanged":
            with contextlib.suppress(CommandError):  # then they wait until their failures expire
                self._connect().forget_failures(timeout_s=_APPLY_TIMEOUT_S)
        return action

    def _write_secret(self, data: Mapping[str, bytes]) -> str:
        try:
            return write_folder(self._storage_config, data)
        except OSError as error:
            fault = f"{self._storage_config}: cannot be written: {error.strerror or error}"
            raise SyncRefused(fault) from error

    def _connect(self) -> Connection:
        with self._lock:
            if self._connection is None:
                self._connection = Connection(self._target)
            return self._connection


def _sync_error(error: CommandError) -> SyncRefused | SyncUnavailable:
    transient = error.exit_code in (Exit.UNREACHABLE, Exit.TIMED_OUT) or error.message.startswith(
        ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED")
    )
    return SyncUnavailable(error.message) if transient else SyncRefused(error.message)


class CommandLineFront:
    """``mesh.up.run.Front``. With TLS, the router's own certificate is trusted and shown."""

    def __init__(self, tls_cert: Path | None, tls_key: Path | None, *, mutual: bool) -> None:
        self._tls_cert = tls_cert
        self._tls_key = tls_key
        self._mutual = mutual

    def _target(self, address: str) -> Target:
        return Target(
            address,
            tls=self._tls_cert is not None,
            tls_ca=self._tls_cert,
            tls_cert=self._tls_cert,
            tls_key=self._tls_key,
        )

    def applier(self, address: str, storage_config: Path) -> Applier:
        return MeshApplier(self._target(address), storage_config)

    def capacity_text(self, capacity_bytes: int) -> str:
        return format_size(capacity_bytes)

    def request_to_paste(
        self, addresses: Addresses, models: Sequence[str], folder: Path | None
    ) -> str:
        curl = f"{self._curl()}{addresses.rest}"
        if not models:
            return f"No model yet: `mesh apply -f FILE`, or --models DIR. Ask:\n  {curl}/v2"
        example = _from_folder(folder, models) if folder is not None else None
        if example is not None:
            body = shlex.quote(json.dumps(example["request"]))
            answer = json.dumps(example["response"], separators=(",", ":"))
            return (
                f"A request to paste:\n  {curl}{example['path']} -d {body}\n"
                f"and its answer:\n  {answer}"
            )
        request = self._example(addresses.grpc, models[0])
        if request is None:
            return f"Ask for its models:\n  mesh --address {addresses.grpc} get models"
        body = shlex.quote(json.dumps(request))
        return f"A request to paste:\n  {curl}/v2/models/{models[0]}/infer -d {body}"

    def _curl(self) -> str:
        """curl and the scheme; with mutual TLS the server's own certificate is shown to it."""
        if self._tls_cert is None or self._tls_key is None:
            return "curl -s http://"
        cert, key = shlex.quote(str(self._tls_cert)), shlex.quote(str(self._tls_key))
        shown = f" --cert {cert} --key {key}" if self._mutual else ""
        return f"curl -s --cacert {cert}{shown} https://"

    def _example(self, grpc: str, model: str) -> dict[str, Any] | None:
        """A request of the right shape; None when the model does not tell or is too large."""
        try:
            with Connection(self._target(grpc)) as connection:
                reply = connection.call(
                    _METADATA,
                    oip_pb2.ModelMetadataRequest(name=model).SerializeToString(),
                    timeout_s=_METADATA_TIMEOUT_S,
                )
        except CommandError:
            return None
        return example_request(oip_pb2.ModelMetadataResponse.FromString(reply))


def _from_folder(folder: Path, models: Sequence[str]) -> dict[str, Any] | None:
    """The first example of ``mesh.samples`` beside the models, if they are samples."""
    try:
        examples = json.loads((folder / EXAMPLES).read_text("utf-8"))
        fitting = (one for one in examples if one["model"] in models)
        example: dict[str, Any] | None = next(fitting, None)
        return example if example is None or example.keys() >= _EXAMPLE_FIELDS else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def example_request(metadata: oip_pb2.ModelMetadataResponse) -> dict[str, Any] | None:
    """A v2 body with one small value for every element; open dimensions are 1."""
    inputs: list[dict[str, Any]] = []
    for tensor in metadata.inputs:
        shape = [size if size > 0 else 1 for size in tensor.shape]
        count = 1
        for size in shape:
            count *= size
        if count > _ELEMENTS_MAX:
            return None
        data = [_value(tensor.datatype, at) for at in range(count)]
        inputs.append(
            {"name": tensor.name, "shape": shape, "datatype": tensor.datatype, "data": data}
        )
    return {"inputs": inputs} if inputs else None


def _value(datatype: str, at: int) -> Any:
    if datatype == "BYTES":
        return "text"
    if datatype == "BOOL":
        return at % 2 == 0
    return at + 0.5 if datatype.startswith(("FP", "BF")) else at
