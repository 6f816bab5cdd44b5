"""The REST front end: v2 with the binary tensor extension, the repository calls, and v1 predict.

Bodies of inference are relayed unparsed to the instance that has the model (its ``Rest`` method);
metadata, configuration and statistics are its gRPC answers written as JSON; the rest is answered
from the view. Everything goes through the same dispatcher as gRPC: hits, misses, retries, limits
and metrics are shared.

Errors are ``{"error": "..."}`` with the HTTP status of their code, and ``Retry-After`` where a
retry makes sense. A client's deadline is the header ``X-Request-Timeout`` in seconds. A client that
goes away cancels its request. A body over the limit is 413.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import orjson
from aiohttp import web
from google.protobuf.message import Message

from mesh.core.errors import (
    HTTP_STATUS,
    Code,
    InvalidArgument,
    MeshError,
    NotFound,
    Unimplemented,
)
from mesh.internal_calls import REST_PATH
from mesh.wire.client import Reply
from protos import oip_pb2 as pb
from router.gateway import Gateway
from router.oip import EXTENSIONS, SERVER_NAME, SERVICE, Oip, no_load_parameters
from router.rest_json import document_of

log = logging.getLogger(__name__)

TIMEOUT_HEADER: Final = "X-Request-Timeout"
LENGTH_HEADER: Final = "Inference-Header-Content-Length"
_JSON: Final = "application/json"
# The longest deadline that a client may ask for; more than any load takes.
MAX_TIMEOUT_S: Final = 86_400.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Rest:
    """The handlers of ``application``. ``max_body_bytes`` bounds a request's body."""

    gateway: Gateway
    oip: Oip
    max_body_bytes: int

    def application(self) -> web.Application:
        app = web.Application(client_max_size=self.max_body_bytes, middlewares=[_errors])
        for version in ("", "/versions/{version}"):
            model = "/v2/models/{model}" + version
            app.router.add_get(model, self.model_metadata)
            app.router.add_get(model + "/ready", self.model_ready)
            app.router.add_get(model + "/config", self.model_config)
            app.router.add_get(model + "/stats", self.model_stats)
            app.router.add_post(model + "/infer", self.infer)
        app.router.add_get("/v2", self.server_metadata)
        app.router.add_get("/v2/", self.server_metadata)
        app.router.add_get("/v2/health/live", self.live)
        app.router.add_get("/v2/health/ready", self.ready)
        app.router.add_get("/v2/models", self.models)
        app.router.add_post("/v2/repository/index", self.repository_index)
        app.router.add_post("/v2/repository/models/{model}/load", self.repository_load)
        app.router.add_post("/v2/repository/models/{model}/unload", self.repository_unload)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{model}", self.v1_model)
        app.router.add_post("/v1/models/{model}:predict", self.predict)
        app.router.add_post("/v1/models/{model}:explain", self.no_explain)
        return app

    # ---- inference ------------------------------------------------------------------------------

    async def infer(self, request: web.Request) -> web.Response:
        return await self._relay(request, "v2-infer", f"/{SERVICE}/ModelInfer")

    async def predict(self, request: web.Request) -> web.Response:
        return await self._relay(request, "v1-predict", "/v1/predict")

    async def _relay(self, request: web.Request, kind: str, label: str) -> web.Response:
        shown = request.match_info["model"]
        metadata = [
            ("mesh-rest-kind", kind),
            ("mesh-client-model-name", quote(shown, safe="")),
        ]
        version = request.match_info.get("version")
        if version:
            metadata.append(("mesh-client-model-version", quote(version, safe="")))
        length = request.headers.get(LENGTH_HEADER)
        if length is not None:
            metadata.append((LENGTH_HEADER.lower(), length))
        reply = await self.gateway.call(
            REST_PATH,
            _model_name(request),
            await request.read(),
            metadata=metadata,
            timeout_s=_timeout_s(request),
            label=label,
        )
        return _relayed(reply)

    # ---- a model's own answers ------------------------------------------------------------------

    async def model_metadata(self, request: web.Request) -> web.Response:
        answer = pb.ModelMetadataResponse()
        await self._ask(request, "ModelMetadata", pb.ModelMetadataRequest, answer)
        return _json(document_of(answer))

    async def model_config(self, request: web.Request) -> web.Response:
        answer = pb.ModelConfigResponse()
        await self._ask(request, "ModelConfig", pb.ModelConfigRequest, answer)
        return _json(document_of(answer.config))

    async def model_stats(self, request: web.Request) -> web.Response:
        answer = pb.ModelStatisticsResponse()
        await self._ask(request, "ModelStatistics", pb.ModelStatisticsRequest, answer)
        return _json(document_of(answer))

    async def _ask(self, request: web.Request, rpc: str, question: Any, answer: Message) -> None:
        """Ask a copy by gRPC and parse what it says into ``answer``."""
        message = question(
            name=request.match_info["model"], version=request.match_info.get("version", "")
        )
        reply = await self.gateway.call(
            f"/{SERVICE}/{rpc}",
            _model_name(request),
            message.SerializeToString(),
            timeout_s=_timeout_s(request),
        )
        answer.ParseFromString(reply.message)

    async def model_ready(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        ready, why = await self.oip.model_ready(_model_name(request))
        if ready:
            return _json({"name": name, "ready": True})
        return _json({"name": name, "ready": False, "error": why}, status=503)

    async def v1_model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        ready, _ = await self.oip.model_ready(_model_name(request))
        return _json({"name": name, "ready": ready}, status=200 if ready else 503)

    # ---- the server ---------------------------------------------------------------------------

    async def server_metadata(self, _: web.Request) -> web.Response:
        return _json(
            {
                "name": SERVER_NAME,
                "version": self.oip.software_version,
                "extensions": EXTENSIONS,
            }
        )

    async def live(self, _: web.Request) -> web.Response:
        return _json({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        ready = self.oip.readiness.ready
        return _json({"ready": ready}, status=200 if ready else 503)

    async def models(self, _: web.Request) -> web.Response:
        return _json({"models": self.oip.client_names()})

    async def no_explain(self, _: web.Request) -> web.Response:
        raise Unimplemented("explanations of predictions are not supported yet")

    # ---- the repository -------------------------------------------------------------------------

    async def repository_index(self, request: web.Request) -> web.Response:
        body = await _object(request)
        ready = body.get("ready", False)
        if not isinstance(ready, bool):
            raise InvalidArgument(f"ready: expected true or false; found {ready!r}")
        return _json(
            [
                {"name": e.name, "version": e.version, "state": e.state, "reason": e.reason}
                for e in self.oip.index(ready_only=ready)
            ]
        )

    async def repository_load(self, request: web.Request) -> web.Response:
        parameters = (await _object(request)).get("parameters") or {}
        if not isinstance(parameters, dict):
            raise InvalidArgument("parameters: expected an object")
        if parameters:
            raise no_load_parameters(parameters)
        name = request.match_info["model"]
        await self.oip.load(name)
        return _json({"name": name, "load": True})

    async def repository_unload(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        await self.oip.unload(name)
        return _json({"name": name, "unload": True})


# ---- requests -----------------------------------------------------------------------------------


def _model_name(request: web.Request) -> str:
    """Whom the request is for: a header wins over the URL, as with gRPC."""
    model_id = request.headers.get("mm-model-id")
    vmodel_id = request.headers.get("mm-vmodel-id")
    if model_id is not None and vmodel_id is not None:
        raise InvalidArgument("the headers mm-model-id and mm-vmodel-id exclude each other")
    name = model_id if model_id is not None else vmodel_id
    if name is None:
        return request.match_info["model"]
    if not name:
        raise InvalidArgument("the header mm-model-id or mm-vmodel-id is empty")
    return name


def _timeout_s(request: web.Request) -> float | None:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidArgument(
            f"{TIMEOUT_HEADER}: expected seconds above 0 and at most {MAX_TIMEOUT_S:.0f}; "
            f"found {text[:40]!r}"
        )
    return timeout_s


async def _object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object; an empty one is {}."""
    body = await request.read()
    if not body.strip():
        return {}
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidArgument("the body: expected a JSON object")
    return document


# ---- replies ------------------------------------------------------------------------------------


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(document), status=status, content_type=_JSON)


def _relayed(reply: Reply) -> web.Response:
    """The instance's body, as it came."""
    headers: dict[str, str] = {"Content-Type": _JSON}
    for name, value in reply.initial:
        if name == b"mesh-http-content-type":
            headers["Content-Type"] = value.decode("ascii", "replace")
        elif name == b"inference-header-content-length":
            headers[LENGTH_HEADER] = value.decode("ascii", "replace")
    return web.Response(body=reply.message, headers=headers)


def error_response(error: MeshError) -> web.Response:
    """``{"error": message}`` with the status of the error's code."""
    response = web.Response(
        body=orjson.dumps({"error": error.message}),
        status=HTTP_STATUS[error.code],
        content_type=_JSON,
    )
    if error.retryable and error.retry_after_ms is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_ms / 1_000)))
    return response


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except MeshError as error:
        return error_response(error)
    except web.HTTPRequestEntityTooLarge:
        text = f"the body is over the limit of {request.client_max_size} bytes"
        return web.Response(body=orjson.dumps({"error": text}), status=413, content_type=_JSON)
    except web.HTTPNotFound:
        return error_response(NotFound(f"there is nothing at {request.path}"))
    except web.HTTPMethodNotAllowed as error:
        text = f"{request.method} is not allowed at {request.path}"
        return web.Response(
            body=orjson.dumps({"error": text}),
            status=405,
            content_type=_JSON,
            headers={"Allow": ", ".join(sorted(error.allowed_methods))},
        )
    except web.HTTPException:
        raise
    except Exception:
        log.exception("%s %s", request.method, request.path)
        text = "a defect of this server; its log says more"
        return error_response(MeshError(text, code=Code.INTERNAL))
