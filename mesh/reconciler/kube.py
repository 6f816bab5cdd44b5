"""The Kubernetes API as JSON dicts; the only importer of ``kubernetes``.

From that package come the credentials (kubeconfig with its plug-ins and certificates, or the pod's
service account with its token renewed), nothing else. Every call has a time-out and fails with one
of ``kube_errors``. A write that ran out of time may have been done: callers read and compare.

At most ``writes_in_flight`` writes are on their way at once; others queue, and their time-outs
start when it is their turn. Reads and watches are the caller's to bound.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import orjson
from yaml import YAMLError

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
from mesh.reconciler.kube_wire import USER_AGENT, WRITES, Configuration, Limits, Wire

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

logger = logging.getLogger(__name__)

FIELD_MANAGER: Final = USER_AGENT
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_MERGE_PATCH: Final = "application/merge-patch+json"
_APPLY_PATCH: Final = "application/apply-patch+yaml"  # JSON is YAML

EventType = Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
Patch = dict[str, Any]


class KubeConfigError(Exception):
    """No usable configuration: the message names the file and what is wrong with it."""


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
        refresh: Refresh,
        *,
        namespace: str = "default",
        limits: Limits | None = None,
    ) -> None:
        """Use ``connect``. ``refresh`` renews the configuration's credentials if they are due."""
        self.limits = limits or Limits()
        self.namespace = namespace  # the kubeconfig's context's, or the pod's own
        self._wire = Wire(configuration, refresh, self.limits)

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
    def calls_total(self) -> Counter[tuple[str, str, int]]:
        """Answers by (verb, plural, HTTP status); status 0 where none came."""
        return self._wire.calls_total

    @property
    def writes_total(self) -> int:
        """Writes that were sent, whatever became of them; a retried 429 counts each time."""
        return sum(count for (verb, _, _), count in self.calls_total.items() if verb in WRITES)

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Obj:
        """Raises ApiNotFound where there is none."""
        return await self._wire.call("GET", Request("get", resource, namespace, name))

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

    async def newest_version(self, resource: Resource, namespace: str | None = None) -> str:
        """The resourceVersion of a list now, without the list."""
        page = await self._wire.call(
            "GET", Request("list", resource, namespace), query={"limit": "1"}
        )
        return str(page["metadata"]["resourceVersion"])

    async def create(self, resource: Resource, obj: Obj) -> Obj:
        """Raises ApiExists, ApiInvalid, ApiForbidden."""
        namespace = obj["metadata"].get("namespace")
        name = obj["metadata"].get("name", "")
        request = Request("create", resource, namespace, name)
        return await self._wire.call("POST", request, body=obj, path=resource.path(namespace))

    async def replace(self, resource: Resource, obj: Obj, *, urgent: bool = False) -> Obj:
        """PUT; compares ``metadata.resourceVersion`` where it is given. Raises ApiConflict.

        An urgent one does not queue behind ``writes_in_flight`` others.
        """
        request = _about("update", resource, obj)
        return await self._wire.call("PUT", request, body=obj, urgent=urgent)

    async def replace_status(self, resource: Resource, obj: Obj) -> Obj:
        """PUT of the subresource: all but ``status`` is left alone. Raises ApiConflict."""
        return await self._wire.call("PUT", _about("update", resource, obj, "status"), body=obj)

    async def patch(
        self, resource: Resource, namespace: str | None, name: str, patch: Patch
    ) -> Obj:
        """JSON merge patch; with ``metadata.resourceVersion`` in it, one that compares."""
        request = Request("patch", resource, namespace, name)
        return await self._wire.call("PATCH", request, body=patch, content_type=_MERGE_PATCH)

    async def patch_status(
        self, resource: Resource, namespace: str | None, name: str, patch: Patch
    ) -> Obj:
        """JSON merge patch of the subresource; ``patch`` is ``{"status": {...}}``."""
        request = Request("patch", resource, namespace, name, "status")
        return await self._wire.call("PATCH", request, body=patch, content_type=_MERGE_PATCH)

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
        return await self._wire.call(
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
            await self._wire.call(
                "DELETE", Request("delete", resource, namespace, name), body=options
            )
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
        async with contextlib.aclosing(self._wire.stream(request, query, on_open)) as lines:
            async for line in lines:
                yield _event_of(request, line)

    async def close(self) -> None:
        """Breaks what is under way."""
        await self._wire.close()

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
            page = await self._wire.call("GET", request, query=query)
            kind = str(page.get("kind", "")).removesuffix("List") or resource.kind
            for item in page.get("items") or ():
                whole = {"apiVersion": resource.api_version, "kind": kind, **item}
                items.append(keep(whole) if keep is not None else whole)
            metadata = page["metadata"]
            if not metadata.get("continue"):
                return Listing(items, str(metadata["resourceVersion"]))
            query["continue"] = metadata["continue"]


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


Refresh = Callable[[], Awaitable[None]]


async def _load(kubeconfig: Path | None, context: str | None) -> tuple[Configuration, Refresh, str]:
    """The configuration, what renews its credentials, and the namespace that it names."""
    # Here, since it takes a second and 70 MB that whoever wants a Resource should not pay.
    from kubernetes.aio import client, config

    configuration = client.Configuration()
    whence = f"kubeconfig {kubeconfig}" if kubeconfig is not None else "as a pod"

    async def load() -> str:
        try:
            if kubeconfig is None:
                config.load_incluster_config(client_configuration=configuration)
                return _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else ""
            if not kubeconfig.is_file():  # noqa: ASYNC240 (a small file, seldom)
                raise KubeConfigError(f"{whence}: there is no such file")
            loader = await config.load_kube_config(
                config_file=str(kubeconfig),
                context=context,
                client_configuration=configuration,
                persist_config=False,
            )
            return str(loader.current_context["context"].get("namespace") or "")
        except (config.ConfigException, OSError) as error:
            raise KubeConfigError(f"{whence}: {error}") from error
        # The loader does not look what it was given: anything may come of a file of another kind.
        except (YAMLError, TypeError, AttributeError) as error:
            raise KubeConfigError(f"{whence} does not read as one: {error}") from error

    async def load_again() -> None:
        try:
            await load()
        except KubeConfigError as error:
            logger.warning("credentials could not be read anew: %s", error)

    namespace = await load()
    return configuration, load_again, namespace or "default"
