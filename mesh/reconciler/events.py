"""Records events (core/v1 Event) on objects, for ``kubectl describe``.

Best effort: ``emit`` neither waits nor fails, and what cannot be written is dropped and counted.
The same event of the same object is one Event whose count grows, and one object may speak up
``BURST`` times, then once in ``REFILL_MS`` (client-go's numbers): a loop that fails cannot fill
etcd.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from mesh.reconciler.kube import ApiAway, ApiError, ApiExists, ApiNotFound, Kube, Obj
from mesh.reconciler.kube_resources import EVENTS
from mesh.reconciler.work_queue import backoff_ms

logger = logging.getLogger(__name__)

EventKind = Literal["Normal", "Warning"]

BURST: Final = 25
REFILL_MS: Final = 300_000
# Two thousand objects may each have one to tell at once.
_PENDING: Final = 4_096
_REMEMBERED: Final = 4_096
_TRIES: Final = 5
_BASE_MS: Final = 500
# The API server's own limit of ``message``, in characters.
_MESSAGE: Final = 1_024
# Of the 253 that a name may have: a dot and 16 hexadecimal digits follow.
_NAME: Final = 236


@dataclass(frozen=True, slots=True)
class EventKey:
    """What makes two events the same."""

    uid: str
    api_version: str
    object_kind: str
    namespace: str
    name: str
    kind: EventKind
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class _Written:
    event_name: str
    count: int


class Allowance:
    """Tokens of each object; bounded, and the longest silent are forgotten first."""

    def __init__(
        self, *, burst: int = BURST, refill_ms: int = REFILL_MS, limit: int = _REMEMBERED
    ) -> None:
        self._burst = burst
        self._refill_ms = refill_ms
        self._limit = limit
        self._known: OrderedDict[str, tuple[float, int]] = OrderedDict()  # tokens, as of ms

    def take(self, uid: str, now_ms: int) -> bool:
        """False where that object has said enough for now."""
        tokens, as_of_ms = self._known.pop(uid, (float(self._burst), now_ms))
        tokens = min(self._burst, tokens + (now_ms - as_of_ms) / self._refill_ms)
        allowed = tokens >= 1
        self._known[uid] = (tokens - 1 if allowed else tokens, now_ms)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
        return allowed


class EventRecorder:
    """Run ``run()`` as a task. ``emit`` may be called before that, and never fails or blocks."""

    def __init__(self, kube: Kube, *, component: str, instance: str) -> None:
        self.dropped_total = 0
        self._kube = kube
        self._component = component
        self._instance = instance
        self._pending: dict[EventKey, int] = {}  # times; the oldest first
        self._written: OrderedDict[EventKey, _Written] = OrderedDict()
        self._allowance = Allowance()
        self._moved = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._refusal = ""  # what was last logged

    def emit(self, about: Obj, kind: EventKind, reason: str, message: str) -> None:
        """``about`` is the whole object or anything with apiVersion, kind and metadata
        (namespace, name, uid)."""
        metadata = about["metadata"]
        key = EventKey(
            uid=metadata.get("uid", ""),
            api_version=about.get("apiVersion", ""),
            object_kind=about.get("kind", ""),
            namespace=metadata.get("namespace", ""),
            name=metadata["name"],
            kind=kind,
            reason=reason,
            message=message[:_MESSAGE],
        )
        known = self._pending.get(key)
        if known is None and (
            len(self._pending) >= _PENDING or not self._allowance.take(_whose(key), _now_ms())
        ):
            self.dropped_total += 1
            return
        self._pending[key] = (known or 0) + 1
        self._settled.clear()
        self._moved.set()

    async def settled(self) -> None:
        """Until everything that was emitted is written or dropped."""
        await self._settled.wait()

    async def run(self) -> None:
        """Writes until cancelled, one at a time."""
        while True:
            self._moved.clear()
            while self._pending:
                key = next(iter(self._pending))
                await self._record(key, self._pending.pop(key))
            self._settled.set()
            await self._moved.wait()

    async def _record(self, key: EventKey, times: int) -> None:
        fresh = self._event(key, times)  # one name for all tries: a create may have been done
        for failures in range(1, _TRIES + 1):
            try:
                await self._write(key, times, fresh)
                return
            except ApiAway as error:
                if failures < _TRIES:
                    delay_ms = backoff_ms(failures, random.random(), _BASE_MS)
                    await asyncio.sleep(max(delay_ms / 1_000, error.retry_after_s))
                    continue
                self._drop(error)
            except ApiError as error:
                self._drop(error)
                return

    async def _write(self, key: EventKey, times: int, fresh: Obj) -> None:
        written = self._written.pop(key, None)
        if written is not None:
            grown = _Written(written.event_name, written.count + times)
            patch = {"count": grown.count, "lastTimestamp": _timestamp()}
            try:
                await self._kube.patch(EVENTS, _home(key), grown.event_name, patch)
            except ApiNotFound:  # events live for an hour
                written = None
            except ApiAway:
                self._written[key] = written
                raise
            else:
                self._remember(key, grown)
        if written is None:
            with suppress(ApiExists):
                await self._kube.create(EVENTS, fresh)
            self._remember(key, _Written(fresh["metadata"]["name"], times))

    def _event(self, key: EventKey, times: int) -> Obj:
        now = _timestamp()
        stem = key.name[:_NAME].rstrip("-.")
        about = {"kind": key.object_kind, "apiVersion": key.api_version, "name": key.name}
        if key.namespace:
            about["namespace"] = key.namespace
        if key.uid:
            about["uid"] = key.uid
        return {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"name": f"{stem}.{time.time_ns():016x}", "namespace": _home(key)},
            "involvedObject": about,
            "type": key.kind,
            "reason": key.reason,
            "message": key.message,
            "count": times,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "reportingInstance": self._instance,
        }

    def _remember(self, key: EventKey, written: _Written) -> None:
        self._written[key] = written
        while len(self._written) > _REMEMBERED:
            self._written.popitem(last=False)

    def _drop(self, error: ApiError) -> None:
        self.dropped_total += 1
        # By what was refused, not by the object: a missing right is said once, not 2,000 times.
        refusal = f"{error.request.verb} {error.reason}"
        if refusal != self._refusal:
            logger.warning("an event is lost: %s", error)
        self._refusal = refusal


def _whose(key: EventKey) -> str:
    return key.uid or f"{key.object_kind}/{key.namespace}/{key.name}"


def _home(key: EventKey) -> str:
    """Where the Event lies; those of cluster-wide objects lie in ``default``."""
    return key.namespace or "default"


def _timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
