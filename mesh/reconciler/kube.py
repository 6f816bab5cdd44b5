"""The Kubernetes API as JSON dicts over one aiohttp session; the only importer of ``kubernetes``.

From that package come the credentials (kubeconfig with its plug-ins and certificates, or the pod's
service account with its token renewed), nothing else. Every call has a time-out and fails with one
of ``kube_errors``; nothing is retried here but a 429 that names a time within the call's own
time-out, and a 401 once with fresh credentials. A write that ran out of time may have been done.

At most ``writes_in_flight`` writes are on their way at once; others queue, and their time-outs
start when it is their turn. Reads and watches are the caller's to bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import orjson

from mesh.reconciler.kube_errors import (
    ApiAway,
    ApiConflict,
    ApiError,
    ApiExists,
    ApiExpired,
    ApiForbidden,
    ApiInvalid,
    ApiNotFound,
    Cause,
    Request,
    error_of,
)
from mesh.reconciler.kube_resources import Key, Obj, Resource, key_of

if TYPE_CHECKING:
    from kubernetes.aio.client import Configuration

__all__ = [
    "ApiAway",
    "ApiConflict",
    "ApiError",
    "ApiExists",
    "ApiExpired",
    "ApiForbidden",
    "ApiInvalid",
    "ApiNotFound",
    "Cause",
    "Key",
    "Kube",
    "KubeConfigError",
    "Limits",
    "Listing",
    "Obj",
    "Request",
    "Resource",
    "WatchEvent",
    "key_of",
]

FIELD_MANAGER: Final = "mesh-controller"
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_JSON: Final = "application/json"
_MERGE_PATCH: Final = "application/merge-patch+json"
_APPLY_PATCH: Final = "application/apply-patch+yaml"  # JSON is YAML
_WRITES: Final = frozenset({"create", "update", "patch", "delete"})
# A server that died without a word is noticed on an idle watch after 30 s + 3 x 10 s.
_KEEPALIVE: Final = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
# Beyond what the server was asked to end a watch after: then it is not the server's clock.
_WATCH_MARGIN_S: Final = 15.0

EventType = Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
Patch = dict[str, Any]


class KubeConfigError(Exception):
    """No usable configuration: the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a client."""

    call_timeout_s: float = 15.0
    # As client-go's reflector, which draws from 5 to 10 minutes.
    watch_timeout_s: float = 420.0
    page_size: int = 500
    writes_in_flight: int = 16


@dataclass(frozen=True, slots=True)
class Listing:
    """All objects at one moment, and the resourceVersion to watch on from."""

    items: list[Obj]
    resource_version: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change. A BOOKMARK's object has nothing but ``metadata.resourceVersion``."""

    type: EventType
    object: Obj

    @property
    def resource_version(self) -> str:
        return str(self.object["metadata"]["resourceVersion"])


class Kube:
    """One client of one API server. ``await Kube.connect(...)``, then ``await close()``.

    ``namespace`` arguments: None where the resource is cluster-wide or all namespaces are meant.
    Objects that are passed in carry their own namespace and name, and are not changed.
    """

    def __init__(
        self,
        configuration: Configuration,
        refresh: Callable[[], Awaitable[None]],
        *,
        namespace: str = "default",
        limits: Limits | None = None,
    ) -> None:
        """Use ``connect``. ``refresh`` renews the configuration's credentials if they are due."""
        self.limits = limits or Limits()
        self.namespace = namespace  # the kubeconfig's context's, or the pod's own
        # Answers by (verb, plural, HTTP status); status 0 where none came.
        self.calls_total: Counter[tuple[str, str, int]] = Counter()
        self._configuration = configuration
        self._refresh = refresh
        self._proxy = configuration.proxy or _proxy_of_environment(configuration.host)
        self._writes = asyncio.Semaphore(self.limits.writes_in_flight)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # a watch keeps its connection: a limit would starve the other calls
                ssl=_tls_of(configuration),
                keepalive_timeout=30.0,
                socket_factory=_keepalive_socket,
            ),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    @classmethod
    async def connect(
        cls,
        kubeconfig: Path | None = None,
        *,
        context: str | None = None,
        limits: Limits | None = None,
    ) -> Self:
        """With a kubeconfig, or without one as the pod that this runs in. Raises KubeConfigError.

        Reads files and runs the kubeconfig's exec plug-in; does not talk to the API server.
        """
        configuration, refresh, namespace = await _load(kubeconfig, context)
        return cls(configuration, refresh, namespace=namespace, limits=limits)

    @property
    def writes_total(self) -> int:
        """Writes that were sent, whatever became of them; a retried 429 counts each time."""
        return sum(count for (verb, _, _), count in self.calls_total.items() if verb in _WRITES)

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Obj:
        """Raises ApiNotFound where there is none."""
        return await self._call("GET", Request("get", resource, namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        keep: Callable[[Obj], Obj] | None = None,
    ) -> Listing:
        """Everything, page by page. ``keep`` reduces each object as its page comes in.

        Where the pages expire meanwhile, everything is fetched at once. Each page has a time-out
        of its own. List items lack apiVersion and kind; both are put back.
        """
        selectors = _selectors(label_selector, field_selector)
        try:
            return await self._list(resource, namespace, selectors, self.limits.page_size, keep)
        except ApiExpired:
            return await self._list(resource, namespace, selectors, 0, keep)

    async def create(self, resource: Resource, obj: Obj) -> Obj:
        """Raises ApiExists, ApiInvalid, ApiForbidden."""
        namespace = obj["metadata"].get("namespace")
        name = obj["metadata"].get("name", "")
        request = Request("create", resource, namespace, name)
        return await self._call("POST", request, body=obj, path=resource.path(namespace))

    async def replace(self, resource: Resource, obj: Obj) -> Obj:
        """PUT; compares ``metadata.resourceVersion`` where it is given. Raises ApiConflict."""
        return await self._call("PUT", _about("update", resource, obj), body=obj)

    async def replace_status(self, resource: Resource, obj: Obj) -> Obj:
        """PUT of the subresource: all but ``status`` is left alone. Raises ApiConflict."""
        return await self._call("PUT", _about("update", resource, obj, "status"), body=obj)

    async def patch(
        self, resource: Resource, namespace: str | None, name: str, patch: Patch
    ) -> Obj:
        """JSON merge patch; with ``metadata.resourceVersion`` in it, one that compares."""
        request = Request("patch", resource, namespace, name)
        return await self._call("PATCH", request, body=patch, content_type=_MERGE_PATCH)

    async def patch_status(
        self, resource: Resource, namespace: str | None, name: str, patch: Patch
    ) -> Obj:
        """JSON merge patch of the subresource; ``patch`` is ``{"status": {...}}``."""
        request = Request("patch", resource, namespace, name, "status")
        return await self._call("PATCH", request, body=patch, content_type=_MERGE_PATCH)

    async def apply(self, resource: Resource, obj: Obj, *, dry_run: bool = False) -> Obj:
        """Server-side apply as ``FIELD_MANAGER``, which takes over what it names (force).

        ``obj`` is all that the controller wants to say: what it said before and no longer says is
        removed. An apply that changes nothing leaves the resourceVersion as it is.
        """
        whole = {"apiVersion": resource.api_version, "kind": resource.kind, **obj}
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        if dry_run:
            query["dryRun"] = "All"
        request = _about("patch", resource, obj)
        return await self._call(
            "PATCH", request, body=whole, query=query, content_type=_APPLY_PATCH
        )

    async def delete(
        self, resource: Resource, namespace: str | None, name: str, *, uid: str | None = None
    ) -> bool:
        """False where there was none. With ``uid`` only that object (ApiConflict for another)."""
        options: Obj = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Background",
        }
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            await self._call("DELETE", Request("delete", resource, namespace, name), body=options)
        except ApiNotFound:
            return False
        return True

    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str,
        label_selector: str = "",
        field_selector: str = "",
        on_open: Callable[[], None] | None = None,
    ) -> AsyncGenerator[WatchEvent]:
        """Changes after ``resource_version``, on one connection; close with ``aclosing``.

        Ends when the server ends it (``watch_timeout_s``): resume from the last event's version.
        Raises ApiExpired where that version is gone (list again), ApiAway when the connection
        breaks (resume), other ApiErrors where it is refused. ``on_open`` is called once accepted.
        """
        request = Request("watch", resource, namespace)
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(max(1, round(self.limits.watch_timeout_s))),
            **_selectors(label_selector, field_selector),
        }
        async with contextlib.AsyncExitStack() as stack:
            with self._as_api_errors(request):
                async with asyncio.timeout(self.limits.call_timeout_s):
                    response = await self._send("GET", request, resource.path(namespace), query)
                    await stack.enter_async_context(response)
                    if response.status != HTTPStatus.OK:
                        raise await self._refusal(request, response)
            self._count(request, response.status)
            if on_open is not None:
                on_open()
            async for line in self._lines(request, response):
                yield _event_of(request, line)

    async def close(self) -> None:
        """Breaks what is under way."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _list(
        self,
        resource: Resource,
        namespace: str | None,
        selectors: dict[str, str],
        page_size: int,
        keep: Callable[[Obj], Obj] | None,
    ) -> Listing:
        request = Request("list", resource, namespace)
        items: list[Obj] = []
        query = dict(selectors)
        if page_size:
            query["limit"] = str(page_size)
        while True:
            page = await self._call("GET", request, query=query)
            kind = str(page.get("kind", "")).removesuffix("List") or resource.kind
            for item in page.get("items") or ():
                whole = {"apiVersion": resource.api_version, "kind": kind, **item}
                items.append(keep(whole) if keep is not None else whole)
            metadata = page["metadata"]
            if not metadata.get("continue"):
                return Listing(items, str(metadata["resourceVersion"]))
            query["continue"] = metadata["continue"]

    async def _call(
        self,
        method: str,
        request: Request,
        *,
        path: str = "",
        query: dict[str, str] | None = None,
        body: Obj | None = None,
        content_type: str = _JSON,
    ) -> Obj:
        path = path or request.resource.path(request.namespace, request.name, request.subresource)
        data = orjson.dumps(body) if body is not None else None
        gate = self._writes if request.verb in _WRITES else contextlib.nullcontext()
        async with gate:
            with self._as_api_errors(request):
                async with asyncio.timeout(self.limits.call_timeout_s) as limit:
                    while True:
                        response = await self._send(
                            method, request, path, query or {}, data, content_type
                        )
                        async with response:
                            if response.ok:
                                answer = await _json_of(request, response)
                                self._count(request, response.status)
                                return answer
                            error = await self._refusal(request, response)
                        await _wait_if_told(error, limit.when())

    async def _send(
        self,
        method: str,
        request: Request,
        path: str,
        query: dict[str, str],
        data: bytes | None = None,
        content_type: str = _JSON,
    ) -> aiohttp.ClientResponse:
        """One answer; a 401 is asked again once, with credentials read anew."""
        response = await self._send_once(method, path, query, data, content_type)
        if response.status != HTTPStatus.UNAUTHORIZED:
            return response
        self._count(request, response.status)
        response.release()
        await self._refresh()
        return await self._send_once(method, path, query, data, content_type)

    async def _send_once(
        self, method: str, path: str, query: dict[str, str], data: bytes | None, content_type: str
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": _JSON, "Content-Type": content_type, "User-Agent": FIELD_MANAGER}
        for setting in (await self._configuration.auth_settings()).values():
            headers[setting["key"]] = str(setting["value"]).strip()
        configuration = self._configuration
        # Between two parts of an answer; a watch is silent for as long as it was asked to last.
        silence_s = self.limits.call_timeout_s
        if "watch" in query:
            silence_s = self.limits.watch_timeout_s + _WATCH_MARGIN_S
        return await self._session.request(
            method,
            configuration.host + path,
            params=query,
            data=data,
            headers=headers,
            proxy=self._proxy or None,
            server_hostname=configuration.tls_server_name or None,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_read=silence_s),
        )

    async def _lines(
        self, request: Request, response: aiohttp.ClientResponse
    ) -> AsyncIterator[bytes]:
        """The stream cut into lines, which are as long as an object is (up to some megabytes)."""
        rest: list[bytes] = []
        chunks = response.content.iter_any()
        while True:
            with self._as_api_errors(request):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            *lines, tail = chunk.split(b"\n")
            for line in lines:
                whole = b"".join((*rest, line))
                rest.clear()
                if whole:
                    yield whole
            if tail:
                rest.append(tail)

    async def _refusal(self, request: Request, response: aiohttp.ClientResponse) -> ApiError:
        text = await response.text(errors="replace")
        self._count(request, response.status)
        body: Any = text
        with contextlib.suppress(orjson.JSONDecodeError):
            body = orjson.loads(text)
        retry_after = response.headers.get("Retry-After")
        return error_of(request, response.status, body, retry_after=retry_after)

    @contextlib.contextmanager
    def _as_api_errors(self, request: Request) -> Any:
        try:
            yield
        except TimeoutError as error:
            self._count(request, 0)
            limit_s = self.limits.call_timeout_s
            raise ApiAway(request, f"no answer within {limit_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            self._count(request, 0)
            raise ApiAway(request, str(error) or type(error).__name__) from error

    def _count(self, request: Request, status: int) -> None:
        self.calls_total[request.verb, request.resource.plural, status] += 1


def _about(verb: str, resource: Resource, obj: Obj, subresource: str = "") -> Request:
    metadata = obj["metadata"]
    return Request(verb, resource, metadata.get("namespace"), metadata["name"], subresource)


def _selectors(label_selector: str, field_selector: str) -> dict[str, str]:
    both = {"labelSelector": label_selector, "fieldSelector": field_selector}
    return {name: value for name, value in both.items() if value}


def _event_of(request: Request, line: bytes) -> WatchEvent:
    event = orjson.loads(line)
    if event["type"] == "ERROR":
        status = event["object"]
        raise error_of(request, int(status.get("code") or 500), status)
    return WatchEvent(event["type"], event["object"])


async def _json_of(request: Request, response: aiohttp.ClientResponse) -> Obj:
    try:
        answer: Obj = orjson.loads(await response.read())
    except orjson.JSONDecodeError as error:
        # A captive portal or a proxy, not an API server.
        raise ApiAway(request, "the answer is not JSON", status=response.status) from error
    return answer


async def _wait_if_told(error: ApiError, deadline_s: float | None) -> None:
    """Waits as a 429 asks, where that is in time; else raises. It says that nothing was done."""
    if not isinstance(error, ApiAway) or error.status != HTTPStatus.TOO_MANY_REQUESTS:
        raise error
    now_s = asyncio.get_running_loop().time()
    if not error.retry_after_s or deadline_s is None or now_s + error.retry_after_s > deadline_s:
        raise error
    await asyncio.sleep(error.retry_after_s)


async def _load(
    kubeconfig: Path | None, context: str | None
) -> tuple[Configuration, Callable[[], Awaitable[None]], str]:
    # Here, since it takes a second and 70 MB that whoever wants a Resource should not pay.
    from kubernetes.aio import config
    from kubernetes.aio.client import Configuration

    configuration = Configuration()
    try:
        if kubeconfig is None:
            config.load_incluster_config(client_configuration=configuration)
            namespace = _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else ""

            async def read_anew() -> None:
                config.load_incluster_config(client_configuration=configuration)

            return configuration, read_anew, namespace or "default"
        if not kubeconfig.is_file():  # noqa: ASYNC240 (once, at start)
            raise KubeConfigError(f"kubeconfig {kubeconfig}: there is no such file")

        async def load() -> Any:
            return await config.load_kube_config(
                config_file=str(kubeconfig),
                context=context,
                client_configuration=configuration,
                persist_config=False,
            )

        loader = await load()
        named = loader.current_context["context"].get("namespace")
    except config.ConfigException as error:
        whence = f"kubeconfig {kubeconfig}" if kubeconfig is not None else "as a pod"
        raise KubeConfigError(f"{whence}: {error}") from error

    async def load_again() -> None:
        with contextlib.suppress(config.ConfigException, OSError):
            await load()

    return configuration, load_again, named or "default"


def _tls_of(configuration: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file or None)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _proxy_of_environment(url: str) -> str:
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return ""
    return getproxies().get(parts.scheme, "")


def _keepalive_socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        option = getattr(socket, name, None)
        if option is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
