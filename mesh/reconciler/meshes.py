"""The registry of one namespace's mesh: the only file here that talks to etcd.

``Mesh`` watches everything (the same view that routers have) and says which names changed, so that
nobody polls; it writes through ``mesh.catalog``, by compare-and-swap. While etcd is away its view
stays as it was, ``reachable`` is false and writes raise Unavailable.

``demand/<runtime>`` (a request waits for a pod) is watched beside the view, and deleted here when
it has been met.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from mesh import registry
from mesh.catalog import Action, Catalog
from mesh.core.errors import MeshError
from mesh.core.live_config import RUNTIMES
from mesh.core.types import CopyRecord, FailureRecord, InstanceRecord, VModelRecord
from mesh.core.view import ClusterView
from mesh.manifest import AppliedModel
from mesh.store.api import (
    Delete,
    KVStore,
    ModRevisionIs,
    Put,
    Snapshot,
    StoreUnavailable,
)
from mesh.view_sync import ViewSync

logger = logging.getLogger(__name__)

# Asks the store so often whether it is there: a watch alone tells of nothing while it is away.
_LOOK_S: Final = 5.0
_LOOK_AWAY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Demand:
    """A request waits for a pod of ``runtime``: for this model, since then (Unix milliseconds)."""

    runtime: str
    model_id: str
    at_ms: int


class MeshListener(Protocol):
    """Who hears of changes; called from the loop, must not block."""

    def names_changed(self, namespace: str, names: Collection[str] | None, /) -> None:
        """Aliases whose record, models, copies or failures changed; None: any may have."""

    def demand_changed(self, namespace: str, /) -> None: ...

    def instances_changed(self, namespace: str, /) -> None:
        """One came, went or changed its state; none of its models need have."""

    def usage_changed(self, namespace: str, /) -> None:
        """Models or copies changed, as they do all the time."""


class _NotedView(ClusterView):
    """A view that notes which names and instances were told of."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: set[str] = set()
        self.instances_noted = False

    def put_vmodel(self, record: VModelRecord) -> None:
        self.noted.add(record.name)
        super().put_vmodel(record)

    def delete_vmodel(self, name: str) -> None:
        self.noted.add(name)
        super().delete_vmodel(name)

    def put_instance(self, record: InstanceRecord) -> None:
        known = self.instances.get(record.instance_id)
        if known is None or known.record.state is not record.state:
            self._note_copies(record.instance_id)
        super().put_instance(record)

    def delete_instance(self, instance_id: str) -> None:
        self._note_copies(instance_id)
        super().delete_instance(instance_id)

    def put_copy(self, record: CopyRecord, mod_revision: int = 0) -> None:
        self._note_model(record.model_id)
        super().put_copy(record, mod_revision)

    def delete_copy(self, model_id: str, instance_id: str, mod_revision: int = 0) -> None:
        self._note_model(model_id)
        super().delete_copy(model_id, instance_id, mod_revision)

    def put_failure(self, record: FailureRecord) -> None:
        self._note_model(record.model_id)
        super().put_failure(record)

    def delete_failure(self, model_id: str, instance_id: str) -> None:
        self._note_model(model_id)
        super().delete_failure(model_id, instance_id)

    def _note_model(self, model_id: str) -> None:
        self.noted.update(self.aliases_of(model_id))

    def _note_copies(self, instance_id: str) -> None:
        self.instances_noted = True
        known = self.instances.get(instance_id)
        for model_id in known.copies if known is not None else ():
            self._note_model(model_id)


class Mesh:
    """One namespace's. Run ``run()`` as a task, then ``close()``. ``now_ms`` is wall clock time."""

    def __init__(
        self,
        namespace: str,
        store: KVStore,
        listener: MeshListener,
        *,
        now_ms: Callable[[], int],
    ) -> None:
        self.namespace = namespace
        self.view: ClusterView = _NotedView()
        self.demands: dict[str, Demand] = {}  # by runtime
        self.reachable: bool | None = None  # None: nobody knows yet
        self._noted: _NotedView = self.view
        self._store = store
        self._listener = listener
        self._catalog = Catalog(store, self.view, now_ms=now_ms)
        self._sync = ViewSync(store, self.view, on_step=self._stepped)

    @property
    def synced(self) -> bool:
        """The view has been whole once: what is missing in it is not registered."""
        return self._sync.synced

    @property
    def settled(self) -> bool:
        """The view has been whole, or etcd is known to be away: nothing is to be waited for. The
        listener is told of either."""
        return self.synced or self.reachable is False

    async def run(self) -> None:
        """Until cancelled. An error of a part is a defect, and ends it."""
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._sync.run())
            parts.create_task(self._follow_demand())
            parts.create_task(self._look())

    async def close(self) -> None:
        await self._store.close()

    # ---- writes -----------------------------------------------------------------------------

    async def register(self, applied: AppliedModel) -> Action:
        """As the resource says; a name that is new has its model loaded before anybody asks."""
        if applied.name not in self.view.vmodels:
            applied = replace(applied, alias=replace(applied.alias, awaits_load=True))
        with self._noticing():
            return await self._catalog.apply(applied)

    async def unregister(self, name: str, owner: str) -> bool:
        """Whether it was there and that owner's. Models that others name stay."""
        with self._noticing():
            existed, _ = await self._catalog.delete(name, owner=owner)
            return existed

    async def forget_failures(self, model_ids: Collection[str]) -> None:
        """What failed may be tried again at once: its cause has been seen to."""
        await self._catalog.forget_failures(model_ids)

    async def offer_runtimes(self, runtimes: Mapping[str, Mapping[str, object]]) -> None:
        """Tell routers which runtimes have pods on demand; no write when they know."""
        known = self.view.config.get(RUNTIMES)
        if known == runtimes or (known is None and not runtimes):
            return
        key = registry.config_key(RUNTIMES)
        await self._store.put(key, registry.encode_config(runtimes))

    async def met(self, demand: Demand) -> None:
        """Delete a demand, unless it has been told anew meanwhile."""
        key = registry.demand_key(demand.runtime)
        found = await self._store.get(key)
        if found is not None and registry.decode_demand(demand.runtime, found.value) == (
            demand.model_id,
            demand.at_ms,
        ):
            await self._store.txn([ModRevisionIs(key, found.mod_revision)], [Delete(key)])

    # ---- watching ---------------------------------------------------------------------------

    def _stepped(self, touched: frozenset[str] | None) -> None:
        # What could not be done while etcd was away is due now, whatever the step is about.
        everything = touched is None or not self.reachable
        self.reachable = True
        view = self._noted
        names: set[str] | None = view.noted
        if everything or touched is None:
            names = None
        else:
            for model_id in touched:
                view.noted.update(view.aliases_of(model_id))
        instances = view.instances_noted or everything
        view.noted, view.instances_noted = set(), False
        if names is None or names:
            self._listener.names_changed(self.namespace, names)
        if instances:
            self._listener.instances_changed(self.namespace)
        elif touched or names:
            self._listener.usage_changed(self.namespace)

    async def _follow_demand(self) -> None:
        async for step in self._store.watch(registry.DEMAND_PREFIX):
            if isinstance(step, Snapshot):
                self.demands.clear()
                for item in step.items:
                    self._put_demand(item.key, item.value)
            else:
                for event in step.events:
                    if isinstance(event, Put):
                        self._put_demand(event.key, event.value)
                    elif (key := _runtime_of(event.key)) is not None:
                        self.demands.pop(key, None)
            self._listener.demand_changed(self.namespace)

    def _put_demand(self, key: str, value: bytes) -> None:
        runtime = _runtime_of(key)
        if runtime is None:
            return
        try:
            model_id, at_ms = registry.decode_demand(runtime, value)
        except registry.RecordError as error:
            logger.warning("namespace %s: a demand is skipped: %s", self.namespace, error)
            return
        self.demands[runtime] = Demand(runtime, model_id, at_ms)

    async def _look(self) -> None:
        while True:
            try:
                await self._store.get(registry.LEADER_KEY)
                self._now_reachable(True)
            except MeshError:
                self._now_reachable(False)
            await asyncio.sleep(_LOOK_S if self.reachable else _LOOK_AWAY_S)

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        """A write that finds etcd away tells everybody."""
        try:
            yield
        except StoreUnavailable:
            self._now_reachable(False)
            raise

    def _now_reachable(self, reachable: bool) -> None:
        if reachable == self.reachable:
            return
        self.reachable = reachable
        log = logger.info if reachable else logger.warning
        log("namespace %s: etcd %s", self.namespace, "answers" if reachable else "is away")
        self._listener.names_changed(self.namespace, None)
        self._listener.instances_changed(self.namespace)


def _runtime_of(key: str) -> str | None:
    name = key.removeprefix(registry.DEMAND_PREFIX)
    return registry.unescape(name) if name and "/" not in name else None
