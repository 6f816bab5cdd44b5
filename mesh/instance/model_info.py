"""The gRPC methods that tell about the server and its models; nothing here changes anything."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError, Message

from mesh.core.errors import InvalidArgument, MeshError, NotFound
from mesh.instance.carrier import INFERENCE_SERVICE, Carrier
from mesh.instance.executor import NOT_HERE
from mesh.instance.forms import two_models
from mesh.instance.inference import not_here, peeked_name
from mesh.instance.servable import Servable
from mesh.oip.call import versions_of
from mesh.runtimes.api import TensorSpec
from mesh.wire.server import AsyncUnary, Method, ServerCall, Unary
from protos import oip_pb2

M = TypeVar("M", bound=Message)

SERVER_NAME: Final = "modelmesh-py"
# Only what is implemented.
EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "parameters",
    "statistics",
)
_CONFIG_TYPES: Final = {"BYTES": "TYPE_STRING"}


def parse(kind: type[M], message: bytes) -> M:
    request = kind()
    try:
        request.ParseFromString(message)
    except DecodeError as error:
        raise InvalidArgument(f"the message is no {kind.DESCRIPTOR.name}: {error}") from None
    return request


def quick(handler: Callable[[ServerCall, bytes], Message]) -> Unary:
    """A method that answers at once."""

    def answer(call: ServerCall, message: bytes) -> None:
        try:
            reply = handler(call, message)
        except _NotHere as refusal:
            call.fail(refusal.error, trailers=NOT_HERE)
        except MeshError as error:
            call.fail(error)
        else:
            call.reply(reply.SerializeToString())

    return Unary(answer)


def slow(handler: Callable[[bytes], Awaitable[Message]]) -> AsyncUnary:
    async def answer(_: ServerCall, message: bytes) -> bytes:
        return (await handler(message)).SerializeToString()

    return AsyncUnary(answer)


class _NotHere(Exception):
    def __init__(self, model_id: str) -> None:
        super().__init__(model_id)
        self.error = not_here(model_id)[0]


class ModelInfo:
    """``is_ready`` tells whether this instance takes new requests."""

    def __init__(
        self,
        servables: Mapping[str, Servable],
        software_version: str,
        is_ready: Callable[[], bool],
        carrier: Carrier,
    ) -> None:
        self._servables = servables
        self._carrier = carrier
        self._version = software_version
        self._is_ready = is_ready

    def methods(self) -> dict[str, Method]:
        service = INFERENCE_SERVICE
        return {
            service + "ServerLive": quick(lambda *_: oip_pb2.ServerLiveResponse(live=True)),
            service + "ServerReady": quick(self._server_ready),
            service + "ServerMetadata": quick(self._server_metadata),
            service + "ModelReady": quick(self._model_ready),
            service + "ModelMetadata": self._asked(service + "ModelMetadata", self._model_metadata),
            service + "ModelConfig": self._asked(service + "ModelConfig", self._model_config),
            service + "ModelStatistics": quick(self._model_statistics),
        }

    def _asked(self, path: str, handler: Callable[[ServerCall, bytes], Message]) -> Unary:
        """A method that a model's own process answers where nobody else knows."""
        answered_here = quick(handler).handler

        def answer(call: ServerCall, message: bytes) -> None:
            servable = self._servables.get(call.head.model_id or "")
            if servable is not None and _only_its_process_knows(servable):
                self._carrier.unary(servable, call, message, path)
            else:
                answered_here(call, message)

        return Unary(answer)

    def _server_ready(self, *_: Any) -> Message:
        return oip_pb2.ServerReadyResponse(ready=self._is_ready())

    def _server_metadata(self, *_: Any) -> Message:
        return oip_pb2.ServerMetadataResponse(
            name=SERVER_NAME, version=self._version, extensions=EXTENSIONS
        )

    def _find(self, call: ServerCall, name: str, version: str) -> tuple[Servable, str]:
        """The copy, and the name that the client used for it."""
        routed_name = peeked_name(call.head)
        if routed_name and routed_name != name:
            raise two_models(routed_name, name)
        model_id = call.head.model_id or name
        servable = self._servables.get(model_id)
        if servable is None:
            raise _NotHere(model_id)
        versions = versions_of(servable.metadata)
        if version and version not in versions:
            raise NotFound(
                f"model {model_id!r} has no version {version!r}; it has {list(versions)}"
            )
        servable = servable.of_version(version)
        return servable, name or call.head.vmodel_id or model_id

    def _model_ready(self, call: ServerCall, message: bytes) -> Message:
        request = parse(oip_pb2.ModelReadyRequest, message)
        if call.head.model_id is None and request.name not in self._servables:
            return oip_pb2.ModelReadyResponse(ready=False)
        self._find(call, request.name, request.version)
        return oip_pb2.ModelReadyResponse(ready=True)

    def _model_metadata(self, call: ServerCall, message: bytes) -> Message:
        request = parse(oip_pb2.ModelMetadataRequest, message)
        servable, name = self._find(call, request.name, request.version)
        metadata = servable.metadata
        tensor = oip_pb2.ModelMetadataResponse.TensorMetadata
        return oip_pb2.ModelMetadataResponse(
            name=name,
            versions=versions_of(servable.metadata),
            platform=metadata.platform,
            inputs=[
                tensor(name=s.name, datatype=s.datatype, shape=_shape(s)) for s in metadata.inputs
            ],
            outputs=[
                tensor(name=s.name, datatype=s.datatype, shape=_shape(s)) for s in metadata.outputs
            ],
        )

    def _model_config(self, call: ServerCall, message: bytes) -> Message:
        """The axes are all in ``dims``: max_batch_size is 0, for it would count one of them."""
        request = parse(oip_pb2.ModelConfigRequest, message)
        servable, name = self._find(call, request.name, request.version)
        metadata = servable.metadata
        config = oip_pb2.ModelConfig(
            name=name,
            platform=metadata.platform,
            backend=servable.model_type,
            max_batch_size=0,
            input=[
                oip_pb2.ModelInput(name=s.name, data_type=_config_type(s), dims=_shape(s))
                for s in metadata.inputs
            ],
            output=[
                oip_pb2.ModelOutput(name=s.name, data_type=_config_type(s), dims=_shape(s))
                for s in metadata.outputs
            ],
        )
        return oip_pb2.ModelConfigResponse(config=config)

    def _model_statistics(self, call: ServerCall, message: bytes) -> Message:
        request = parse(oip_pb2.ModelStatisticsRequest, message)
        if not request.name and call.head.model_id is None:
            found = [(servable, servable.model_id) for servable in self._servables.values()]
        else:
            found = [self._find(call, request.name, request.version)]
        return oip_pb2.ModelStatisticsResponse(
            model_stats=[_statistics(servable, name) for servable, name in found]
        )


def _only_its_process_knows(servable: Servable) -> bool:
    """What it is: it has not said, or has said it of the latest of several versions."""
    remote = servable.remote
    if remote is None:
        return False
    return remote.metadata is None or (remote.internal and len(servable.metadata.versions) > 1)


def _shape(spec: TensorSpec) -> list[int]:
    # An unknown rank has no form in the protocol; one free axis is what Triton shows.
    return [-1] if spec.any_rank else list(spec.shape)


def _config_type(spec: TensorSpec) -> str:
    return _CONFIG_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}")


def _statistics(servable: Servable, name: str) -> oip_pb2.ModelStatistics:
    s = servable.statistics
    duration = oip_pb2.StatisticDuration
    done = s.success_count
    return oip_pb2.ModelStatistics(
        name=name,
        version=versions_of(servable.metadata)[0],
        last_inference=servable.use.last_used_at_ms if done else 0,
        # As Triton counts: each row of a request, where the model answers by rows.
        inference_count=s.rows if servable.batch.fits else done,
        execution_count=done - servable.batch.joined_requests + servable.batch.joined_runs,
        inference_stats=oip_pb2.InferStatistics(
            success=duration(count=done, ns=s.success_ns),
            fail=duration(count=s.fail_count, ns=s.fail_ns),
            queue=duration(count=done, ns=s.queue_ns),
            compute_input=duration(count=done, ns=s.decode_ns),
            compute_infer=duration(count=done, ns=s.infer_ns),
            compute_output=duration(count=done, ns=s.encode_ns),
        ),
        memory_usage=[oip_pb2.MemoryUsage(type="CPU", byte_size=servable.size_bytes)],
    )
