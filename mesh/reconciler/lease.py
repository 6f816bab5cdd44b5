"""Elects one leader among controllers by a Lease object, in client-go's terms and among its own.

A candidate follows the Lease by a watch, so that one that is given up is taken at once, and waits
out ``leaseDurationSeconds`` by its own clock from when it last saw the Lease change: clocks are
never compared. A leader writes once in a third of that, and leads no more when it could not for
``renew_deadline_s``, which is before others may take over. Every write compares resourceVersions.
Still two may believe for a moment that they lead (a paused process): what a leader writes compares.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from mesh.reconciler.informer import Informer
from mesh.reconciler.kube import ApiConflict, ApiError, ApiExists, Kube, Obj, Resource
from mesh.reconciler.kube_resources import LEASES

logger = logging.getLogger(__name__)

# Renewals in a lease's length: two may fail.
_RENEWALS: Final = 3


class LeaseElection:
    """One candidate. Run ``run()`` as a task; ``close()`` resigns, so that another takes over.

    ``identity`` must be another for each process (a pod's name and something drawn).
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        name: str,
        identity: str,
        *,
        duration_s: float = 15.0,
        renew_deadline_s: float = 10.0,
        retry_s: float = 2.0,
        on_change: Callable[[bool], None] | None = None,
    ) -> None:
        """``duration_s`` is rounded to whole seconds, of which a Lease has at least one."""
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._duration_s = max(1, round(duration_s))
        self._renew_deadline_s = renew_deadline_s
        self._retry_s = retry_s
        self._on_change = on_change
        self._told = False  # what on_change was last called with
        self._informer = Informer(
            kube, LEASES, namespace, on_change=self._saw, field_selector=f"metadata.name={name}"
        )
        self._lease: Obj | None = None  # as last seen or written
        self._changed_s = 0.0  # when that was
        self._renewed_s: float | None = None  # when our last good write began
        self._try_after_s = 0.0  # not before: a write has just failed
        self._moved = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def is_leader(self) -> bool:
        """Ask before each act: it is also a matter of time."""
        if self._closed or self._renewed_s is None or self.leader_id != self._identity:
            return False
        return _now_s() < self._renewed_s + self._renew_deadline_s

    @property
    def leader_id(self) -> str:
        """Who leads as far as is known here; "" for nobody."""
        return str(_spec(self._lease).get("holderIdentity") or "")

    async def run(self) -> None:
        """Until cancelled or closed. Cancelled alone it does not resign: others wait it out."""
        self._running = asyncio.current_task()
        following = asyncio.create_task(self._informer.run(), name="lease-watch")
        following.add_done_callback(lambda _: self._moved.set())
        try:
            while not (self._closed or following.done()):
                self._moved.clear()
                await self._step()
                self._tell()
                await self._wait_moved()
            if following.done() and not following.cancelled():
                following.result()
        finally:
            following.cancel()
            await asyncio.wait([following])
            self._tell()

    async def close(self) -> None:
        """Resign. Without the API server the others wait out the Lease."""
        if self._closed:
            return
        holds = self.leader_id == self._identity
        self._closed = True
        self._tell()
        running = self._running
        if running is not None and running is not asyncio.current_task():
            running.cancel()
            await asyncio.wait([running])
        if holds:
            with suppress(ApiError, TimeoutError):
                await self._release()

    def _saw(self, _resource: Resource, namespace: str, name: str) -> None:
        seen = self._informer.get(namespace, name)
        if seen is None or _version(seen) > _version(self._lease):  # else our own write come back
            self._take(seen)
        self._moved.set()

    def _take(self, lease: Obj | None) -> None:
        self._lease = lease
        self._changed_s = _now_s()

    async def _step(self) -> None:
        """Renew, or take what nobody has, where it is time to."""
        if not self._informer.synced or _now_s() < self._due_s():
            return
        began_s = _now_s()
        try:
            async with asyncio.timeout(self._renew_deadline_s / 2):
                await self._write(self._wanted(self._identity, self._duration_s))
        except (ApiError, TimeoutError) as error:
            self._try_after_s = _now_s() + self._retry_s
            if isinstance(error, ApiConflict | ApiExists):
                logger.debug("lease %s: %s", self._name, error)
                await self._look()
            else:
                logger.warning("lease %s: %s", self._name, error or "no answer in time")
            return
        self._renewed_s = began_s

    async def _write(self, lease: Obj) -> None:
        if "resourceVersion" in lease["metadata"]:
            self._take(await self._kube.replace(LEASES, lease, urgent=True))
        else:
            self._take(await self._kube.create(LEASES, lease))

    async def _look(self) -> None:
        """After a lost race: what is there now; the watch tells the same a moment later."""
        with suppress(ApiError, TimeoutError):
            async with asyncio.timeout(self._renew_deadline_s / 2):
                seen = await self._kube.get(LEASES, self._namespace, self._name)
                if _version(seen) != _version(self._lease):
                    self._take(seen)
                if self.leader_id == self._identity:
                    self._try_after_s = 0.0  # a renewal that was done and not answered

    def _due_s(self) -> float:
        """When the next write is due."""
        spec = _spec(self._lease)
        holder = spec.get("holderIdentity") or ""
        due_s = 0.0
        if holder == self._identity and self._renewed_s is not None:
            due_s = self._renewed_s + self._duration_s / _RENEWALS
        elif holder and holder != self._identity:
            due_s = self._changed_s + float(spec.get("leaseDurationSeconds") or self._duration_s)
        return max(due_s, self._try_after_s)

    def _wanted(self, holder: str, duration_s: int) -> Obj:
        """The Lease with ``holder`` in it, at the version that was last seen."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        before = _spec(self._lease)
        spec: dict[str, Any] = {
            **before,
            "holderIdentity": holder,
            "leaseDurationSeconds": duration_s,
            "renewTime": now,
        }
        if before.get("holderIdentity") != holder:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(before.get("leaseTransitions") or 0) + (
                1 if self._lease is not None and holder else 0
            )
        metadata = {"name": self._name, "namespace": self._namespace}
        if self._lease is not None:
            metadata = {**self._lease["metadata"]}
            metadata.pop("managedFields", None)
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": metadata,
            "spec": spec,
        }

    async def _release(self) -> None:
        """As client-go does: nobody's, and over in a second."""
        async with asyncio.timeout(self._renew_deadline_s / 2):
            try:
                await self._write(self._wanted("", 1))
            except ApiConflict:  # a renewal that was cut off on its way
                await self._look()
                if self.leader_id == self._identity:
                    await self._write(self._wanted("", 1))

    async def _wait_moved(self) -> None:
        if not self._informer.synced:
            await self._until(self._retry_s)
            return
        until_s = self._due_s()
        if self._told and self._renewed_s is not None:  # to say so when it no longer leads
            until_s = min(until_s, self._renewed_s + self._renew_deadline_s)
        await self._until(until_s - _now_s())

    async def _until(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._moved.wait()

    def _tell(self) -> None:
        leads = self.is_leader
        if leads == self._told:
            return
        self._told = leads
        logger.info("%s %s", self._identity, "leads" if leads else "leads no more")
        if self._on_change is not None:
            self._on_change(leads)


def _spec(lease: Obj | None) -> dict[str, Any]:
    return {} if lease is None else lease.get("spec") or {}


def _version(lease: Obj | None) -> int:
    return 0 if lease is None else int(lease["metadata"]["resourceVersion"])


def _now_s() -> float:
    return asyncio.get_running_loop().time()
