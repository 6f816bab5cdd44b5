"""Server reflection, v1 and v1alpha: the shell around ``mesh.oip.reflection_data``."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from mesh.core.errors import InvalidArgument
from mesh.oip import reflection_data
from mesh.wire.server import Method, StreamCall, Streaming
from protos import reflection_pb2 as pb

_RPC = "ServerReflectionInfo"


def methods() -> dict[str, Method]:
    """Full path to method."""
    services = (reflection_data.REFLECTION_V1, reflection_data.REFLECTION_V1ALPHA)
    return {f"/{service}/{_RPC}": Streaming(_answer_all) for service in services}


async def _answer_all(call: StreamCall) -> None:
    async for message in call:
        try:
            request = pb.ServerReflectionRequest.FromString(message)
        except DecodeError as error:
            raise InvalidArgument(f"{_RPC}: not a ServerReflectionRequest: {error}") from error
        await call.send(reflection_data.answer(request).SerializeToString())
