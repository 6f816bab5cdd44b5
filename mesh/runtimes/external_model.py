"""One model in an external runtime: what of a request is changed on its way there and back.

Pure but for ``unload``. A method is passed on unless the runtime's allow-list says otherwise; its
management methods never are. The model's id goes where the runtime wants it (``methodInfos``); the
Open Inference Protocol's answers come back under the name that the client used. Everything else
stays as it came.

A runtime that does not know the model any more, or that cannot be reached, has lost it: the copy
is dropped and the request goes to one that is loaded anew (``ModelLost``). A connection that broke
while the runtime worked on a request is UNAVAILABLE instead: that request may have been what broke
it, or may have been carried out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from mesh.core.errors import Code, MeshError, Unavailable, Unimplemented
from mesh.protobuf_path import FieldPath, extract, splice
from mesh.runtimes.api import ModelLost, ModelMetadata
from mesh.runtimes.external_calls import SERVICE as MANAGEMENT
from mesh.runtimes.external_status import RuntimeStatus
from mesh.wire.client import Channel, NotSent, RpcError

_OIP: Final = "/inference.GRPCInferenceService/"
# Where the Open Inference Protocol's requests name their model, and its answers.
OIP_REQUESTS: Final[dict[str, FieldPath]] = {
    _OIP + rpc: (1,)
    for rpc in (
        "ModelInfer",
        "ModelStreamInfer",
        "ModelMetadata",
        "ModelReady",
        "ModelConfig",
        "ModelStatistics",
    )
}
OIP_REPLIES: Final[dict[str, FieldPath]] = {
    _OIP + "ModelInfer": (1,),
    _OIP + "ModelStreamInfer": (2, 1),
    _OIP + "ModelMetadata": (1,),
    _OIP + "ModelConfig": (1, 1),
}
# What servers say of a model that they do not have: older ones with other codes than NOT_FOUND, and
# Triton in a stream without any. One that they have, but not in the version asked for, is the
# client's mistake and no reason to load it again.
_TRITON_UNKNOWN: Final = re.compile(
    r"Request for unknown model: '[^']*' (?!version \S+ is not found)"
)
_MLSERVER_UNKNOWN: Final = re.compile(r"Model \S+ not found")
_OTHER_VERSION: Final = re.compile(
    r"Request for unknown model: '[^']*' version \S+ is not found"
    r"|Model \S+ with version \S+ not found"
)
_STREAM_INFER: Final = _OIP + "ModelStreamInfer"
# Field 1 of ModelStreamInferResponse, error_message.
_STREAM_ERROR: Final = b"\x0a"


class ExternalModel:
    """Implements ``RemoteModel``. ``let_go`` unloads it, in whatever thread it is called."""

    metadata: ModelMetadata | None = None
    internal: bool = False

    __slots__ = ("_inject", "_let_go", "_lost", "_name", "_status", "channel", "max_concurrency",
                 "model_id", "size_bytes")  # fmt: skip

    def __init__(
        self,
        model_id: str,
        channel: Channel,
        status: RuntimeStatus,
        *,
        size_bytes: int,
        max_concurrency: int,
        let_go: Callable[[str], None],
        lost: Callable[[RpcError], None],
        server_name: str = "",
    ) -> None:
        self.model_id = model_id
        self.channel = channel
        self.size_bytes = size_bytes
        self.max_concurrency = max_concurrency if status.limits_concurrency else 0
        self._name = (server_name or model_id).encode()
        self._status = status
        self._let_go = let_go
        self._lost = lost
        # A server of the Open Inference Protocol itself knows nothing of the header mm-model-id.
        self._inject: dict[str, FieldPath] = dict(OIP_REQUESTS) if server_name else {}
        self._inject.update({path: at for path, at in status.methods.items() if at is not None})

    def admit(self, path: str) -> MeshError | None:
        if path.startswith(MANAGEMENT) or not self._status.permits(path):
            return Unimplemented("Method not found or not permitted")
        return None

    def request(self, path: str, message: bytes) -> bytes:
        at = self._inject.get(path)
        return message if at is None else splice(message, at, self._name)

    def reply(self, path: str, message: bytes, client_name: str) -> bytes:
        if path == _STREAM_INFER and message[:1] == _STREAM_ERROR:
            said = extract(message, (1,)) or ""
            if _TRITON_UNKNOWN.match(said):
                raise ModelLost(said)
        at = OIP_REPLIES.get(path)
        if at is None or not client_name:
            return message
        return splice(message, at, client_name.encode(), create_parents=False)

    def error(self, path: str, error: RpcError) -> MeshError:
        if isinstance(error, NotSent):
            if error.code is not Code.UNAVAILABLE:  # as many calls as may be are on their way
                return error
            self._lost(error)
            return ModelLost(f"the runtime at {self.channel.address} is away: {error.message}")
        if is_lost(error):
            return ModelLost(error.message)
        if error.code is Code.UNAVAILABLE and not error.trailers:
            self._lost(error)
            return Unavailable(
                f"the runtime at {self.channel.address} went away while it worked on {path} for "
                f"model {self.model_id!r} ({error.message}); retry if that is safe"
            )
        return error

    def unload(self) -> None:
        self._let_go(self.model_id)


def is_lost(error: RpcError) -> bool:
    """Whether a runtime's own answer says that it does not have the model."""
    match error.code:
        case Code.NOT_FOUND:
            return _OTHER_VERSION.fullmatch(error.message) is None
        case Code.UNAVAILABLE:
            return _TRITON_UNKNOWN.match(error.message) is not None
        case Code.INVALID_ARGUMENT:
            return _MLSERVER_UNKNOWN.fullmatch(error.message) is not None
        case _:
            return False
