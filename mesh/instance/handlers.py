"""All gRPC methods of an instance: inference, information, and what only routers call."""

from __future__ import annotations

import math
from typing import Any, Final

import orjson
from google.protobuf.message import Message

from mesh.core.errors import InvalidArgument
from mesh.instance.describe import describe
from mesh.instance.flights import Wish
from mesh.instance.inference import Inference
from mesh.instance.model_info import ModelInfo, parse, quick, slow
from mesh.instance.pod import Pod
from mesh.internal_calls import (
    DECISIONS_PATH,
    DESCRIBE_PATH,
    LOAD_PATH,
    REST_PATH,
    UNLOAD_PATH,
    priority_of,
)
from mesh.wire.server import Method, ServerCall, Streaming, Unary
from protos import mesh_internal_pb2 as internal_pb2

INFERENCE: Final = "/inference.GRPCInferenceService/"
# Decisions that are told when the request names no number, and at most.
DECISIONS_DEFAULT: Final = 100
DECISIONS_MAX: Final = 10_000
# Characters of a reason that a caller gives: it is logged and kept.
REASON_MAX: Final = 200


class InternalMethods:
    """Load, Unload, Describe, Decisions: thin, the pod does the work."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod

    def methods(self) -> dict[str, Method]:
        return {
            LOAD_PATH: slow(self._load),
            UNLOAD_PATH: slow(self._unload),
            DESCRIBE_PATH: quick(self._describe),
            DECISIONS_PATH: quick(self._decisions),
        }

    async def _load(self, message: bytes) -> Message:
        request = parse(internal_pb2.LoadRequest, message)
        answer = await self._pod.load(
            Wish(
                _named(request.model_id),
                request.revision,
                request.last_used_at_ms,
                priority_of(request),
                request.model_record,
                request.pin,
                request.use_score if math.isfinite(request.use_score) else 0.0,
                request.reason[:REASON_MAX],
            )
        )
        return internal_pb2.LoadResponse(
            outcome=internal_pb2.LoadResponse.Outcome.Name(answer.outcome),
            message=answer.message,
            code=int(answer.code),
            claimed_instance_id=answer.claimed_instance_id,
            copy_revision=answer.copy_revision,
            size_bytes=answer.size_bytes,
        )

    async def _unload(self, message: bytes) -> Message:
        request = parse(internal_pb2.UnloadRequest, message)
        was_here = await self._pod.unload(_named(request.model_id), request.reason[:REASON_MAX])
        return internal_pb2.UnloadResponse(was_here=was_here)

    def _describe(self, _: ServerCall, message: bytes) -> Message:
        request = parse(internal_pb2.DescribeRequest, message)
        document: dict[str, Any] = describe(self._pod, _named(request.model_id))
        return internal_pb2.DescribeResponse(json=orjson.dumps(document).decode())

    def _decisions(self, _: ServerCall, message: bytes) -> Message:
        request = parse(internal_pb2.DecisionsRequest, message)
        noted = self._pod.decisions
        limit = min(request.limit or DECISIONS_DEFAULT, DECISIONS_MAX)
        found = noted.decisions.recent(limit, model_id=request.model_id) if noted else ()
        return internal_pb2.DecisionsResponse(json=orjson.dumps(found).decode())


def _named(model_id: str) -> str:
    if not model_id:
        raise InvalidArgument("model_id is empty")
    return model_id


def instance_methods(pod: Pod, inference: Inference, info: ModelInfo) -> dict[str, Method]:
    return {
        INFERENCE + "ModelInfer": Unary(inference.model_infer, inference.accept),
        INFERENCE + "ModelStreamInfer": Streaming(inference.model_stream_infer, inference.accept),
        REST_PATH: Unary(inference.rest, inference.accept),
        **info.methods(),
        **InternalMethods(pod).methods(),
    }
