"""The router process: puts the parts together, starts them in order, and drains on SIGTERM.

Order at the start: the metrics listener (so that a router that waits can be seen waiting), the
store, a first whole view, then gRPC and REST; now it says that it is ready, and stands for
election. Nothing is answered before the view has synced. On SIGTERM or SIGINT the router says that
it is not ready, goes on for ``drain_notice_ms``, sends GOAWAY, lets what is in flight finish for
``drain_timeout_ms`` at most, and ends with 0. When a part that must run for ever ends, the process
ends with 1 for its supervisor to start it again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import secrets
import signal
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final

from mesh.catalog import Catalog
from mesh.core.errors import MeshError
from mesh.core.live_config import POLICY
from mesh.core.policy import Policy
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from mesh.election import Election
from mesh.kserve_status import Endpoints
from mesh.live_policy import LivePolicy
from mesh.metrics import RouterMetrics
from mesh.oip import reflection_data
from mesh.registry import LEADER_KEY
from mesh.store.api import KVStore
from mesh.store.etcd import EtcdStore
from mesh.view_sync import ViewSync
from mesh.wire.calls import Method
from mesh.wire.client import Channel
from mesh.wire.relay import Relay, Upstream
from mesh.wire.server import Server
from mesh.wire.transport import pump_of
from router import reflection
from router.admin import RPCS as ADMIN_RPCS
from router.admin import SERVICE as ADMIN
from router.admin import Admin
from router.admin_decisions import DecisionsAdmin
from router.admin_settings import SettingsAdmin
from router.dataplane import Dataplane
from router.demands import Demands
from router.dispatch import Dispatcher
from router.gateway import Gateway
from router.gauges import report
from router.health import Health
from router.internal import not_for_clients
from router.leader import LeaderLoop
from router.listeners import HTTP1, HTTP2, HttpListener, operations, tls_context
from router.live_settings import LiveSettings
from router.loads import Loads
from router.management import Management
from router.names import NameLookup
from router.oip import IDEMPOTENT, RELAYED, Oip
from router.peers import Peers
from router.readiness import Readiness, State
from router.resource_status import ResourceStatus, own_endpoints
from router.rest import Rest
from router.roster import Roster
from router.rpc import methods_of
from router.serving_runtimes import ServingRuntimes
from router.settings import RouterSettings

log = logging.getLogger(__name__)

# Closing what leads nowhere, forgetting what is gone, asking the store whether it is there.
UPKEEP_S: Final = 2.0
# Looking for instances that do not answer: a tenth of the second within which they are avoided.
WATCH_S: Final = 0.1
# Frozen again when the view has grown so much since: by a tenth, and not for a handful.
_FREEZE_GROWTH: Final = 1.1
_FREEZE_MIN: Final = 1_000
# A scrape in flight at the end may finish.
_SCRAPE_S: Final = 1.0
# Load time-outs after which a placement that nobody reports about no longer counts.
_PENDING_LOADS: Final = 4


@dataclass(frozen=True, slots=True)
class Bound:
    """The ports that a router listens on; None where it does not."""

    grpc_port: int
    rest_port: int | None
    metrics_port: int | None


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Router:
    """One router over a store. ``start`` and ``drain`` once each; ``failed`` is set with the error
    when a part that must run for ever has ended."""

    def __init__(self, settings: RouterSettings, store: KVStore) -> None:
        self.settings = settings
        self.router_id = f"{settings.name}-{secrets.token_hex(4)}"
        self._store = store
        policy = settings.policy
        inside = replace(
            settings.inside_limits, max_message_bytes=settings.limits.max_message_bytes
        )
        self.metrics = RouterMetrics(
            version=settings.software_version,
            per_model=settings.per_model_metrics,
            methods=ADMIN_RPCS,
        )
        self.decisions = DecisionLog(
            now_ms=wall_clock_ms,
            counted=lambda kind, reason: self.metrics.counter("decisions", kind, reason),
            kept=policy.decisions_kept,
        )
        self.live_policy = LivePolicy(policy, self._use_policy, self.decisions)
        self.readiness = Readiness()
        self.view = view = ClusterView()
        self.peers = Peers(
            view,
            make_upstream=lambda address: Upstream(address, limits=inside),
            make_channel=lambda address: Channel(address, limits=inside),
            policy=policy,
            decisions=self.decisions,
        )
        self.demands = Demands(store, view, policy=policy, now_ms=wall_clock_ms)
        self.loads = Loads(
            view,
            self.peers,
            self.metrics,
            policy=policy,
            now_ms=wall_clock_ms,
            decisions=self.decisions,
            avoid=self.peers.avoided,
            use_score=lambda model_id: self.dispatcher.use_score(model_id),
            starved=self.demands.tell,
        )
        self.names = NameLookup(store, view, clock=time.monotonic)
        self.dispatcher = Dispatcher(
            view,
            self.peers,
            self.loads,
            self.names,
            self.metrics,
            policy=policy,
            draw=random.random,
            decisions=self.decisions,
        )
        self.gateway = Gateway(
            self.dispatcher, self.peers, max_held_bytes=settings.limits.max_buffered_bytes_total
        )
        self.catalog = Catalog(store, view, now_ms=wall_clock_ms)
        self.oip = Oip(
            view,
            self.loads,
            self.names,
            self.readiness,
            policy,
            wall_clock_ms,
            settings.software_version,
        )
        self.election = Election(store, self.router_id)
        self.leader = LeaderLoop(
            view,
            self.catalog,
            self.loads,
            policy=policy,
            is_leader=lambda: self.election.is_leader,
            now_ms=wall_clock_ms,
            decisions=self.decisions,
        )
        self.roster = Roster(store, self.router_id)
        self.decisions_admin = DecisionsAdmin(
            self.router_id, view, self.decisions.decisions, self.peers, self.roster
        )
        self.sync = ViewSync(store, view, on_step=self._stepped)
        said = settings.dataplane_config
        self.dataplane = Dataplane(said) if said else None
        self.relay = Relay(
            self.dispatcher,
            peek=RELAYED,
            idempotent=IDEMPOTENT,
            limits=settings.limits,
            rpcs=self.dataplane.read() if self.dataplane is not None else None,
        )
        self.server = Server(self._methods(), limits=settings.limits, fallback=self.relay)
        self.failed: asyncio.Future[None] | None = None
        self._bound = Bound(settings.grpc_port, settings.rest_port, None)
        self._rest: HttpListener | None = None
        self._operations: HttpListener | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._store_connected = False
        self._closed = False
        self._frozen_models = 0
        report(
            self.metrics,
            view,
            dispatcher=self.dispatcher,
            loads=self.loads,
            peers=self.peers,
            leader=self.leader,
            election=self.election,
            relay=self.relay,
            server=self.server,
            store_connected=lambda: self._store_connected,
            now_ms=wall_clock_ms,
        )

    def _methods(self) -> dict[str, Method]:
        metrics = self.metrics
        management = Management(self.view, self.catalog, self.loads, self.names, wall_clock_ms)
        live_settings = LiveSettings(self._store, self.view, on_change=self._read_live_policy)
        runtimes = ServingRuntimes(self.view, live_settings, wall_clock_ms)
        namespace = self.settings.namespace
        self.admin = Admin(
            self.view,
            self.catalog,
            self.dispatcher,
            self.loads,
            self.peers,
            self.oip,
            self.settings.policy,
            wall_clock_ms,
            runtimes,
            ResourceStatus(self.view, runtimes, self._endpoints, namespace, wall_clock_ms),
            namespace,
        )
        settings = SettingsAdmin(self.view, live_settings, self.live_policy)
        health = Health(self.readiness, reflection_data.PUBLIC_SERVICES)
        return {
            **self.oip.methods(metrics),
            **management.methods(metrics),
            **self.admin.methods(metrics),
            **methods_of(ADMIN, {**self.decisions_admin.rpcs(), **settings.rpcs()}, metrics),
            **health.methods(metrics),
            **reflection.methods(),
            **not_for_clients(),
        }

    def _endpoints(self) -> Endpoints:
        bound, settings = self._bound, self.settings
        return own_endpoints(
            settings.host, bound.grpc_port, bound.rest_port, tls=settings.tls is not None
        )

    # ---- life -----------------------------------------------------------------------------------

    async def start(self) -> Bound:
        """Return when the router serves. Waits for the store; raises OSError for a taken port."""
        settings = self.settings
        self.failed = asyncio.get_running_loop().create_future()
        grpc_tls = tls_context(settings.tls, HTTP2) if settings.tls else None
        rest_tls = tls_context(settings.tls, HTTP1) if settings.tls else None
        metrics_port = None
        if settings.metrics_port is not None:
            self._operations = HttpListener(
                operations(self._render, self.state, self.decisions_admin.own),
                drain_timeout_s=_SCRAPE_S,
            )
            metrics_port = await self._operations.start(
                settings.metrics_host, settings.metrics_port
            )
            self.roster.listens(settings.metrics_host, metrics_port)
        await self._store.wait_ready()
        self._store_connected = True
        self._for_ever("view", self.sync.run())
        await self._or_failed(self.sync.wait_synced())
        gc.collect()
        self._freeze()
        pump_of(asyncio.get_running_loop()).on_tick = self.relay.note_queued
        grpc_port = await self.server.start(
            settings.host,
            settings.grpc_port,
            reuse_port=settings.reuse_port,
            ssl_context=grpc_tls,
        )
        rest_port = None
        if settings.rest_port is not None:
            rest = Rest(self.gateway, self.oip, settings.limits.max_message_bytes)
            self._rest = HttpListener(
                rest.application(), drain_timeout_s=settings.drain_timeout_ms / 1_000
            )
            rest_port = await self._rest.start(
                settings.host,
                settings.rest_port,
                reuse_port=settings.reuse_port,
                ssl_context=rest_tls,
            )
        # Not before everything listens: another router may be ended for this one being ready.
        self.readiness.set_synced()
        self._for_ever("election", self.election.run())
        self._for_ever("leader", self.leader.run())
        self._for_ever("upkeep", self._upkeep())
        self._for_ever("watch", self._watch_peers())
        self._for_ever("roster", self.roster.run())
        log.info("router %s serves: gRPC %s:%d, REST %s, %r", self.router_id, settings.host,
                 grpc_port, rest_port, self.view)  # fmt: skip
        self._bound = Bound(grpc_port, rest_port, metrics_port)
        return self._bound

    async def drain(self) -> None:
        """Say that this router leaves, let what is in flight finish, and close everything."""
        settings = self.settings
        self.readiness.set_draining()
        if self._rest is not None:
            self._rest.leave()
        await self.election.close()
        await asyncio.sleep(settings.drain_notice_ms / 1_000)
        timeout_s = settings.drain_timeout_ms / 1_000
        ending = [self.server.drain(timeout_s)]
        if self._rest is not None:
            ending.append(self._rest.drain())
        await asyncio.gather(*ending)
        await self.close()

    async def close(self) -> None:
        """At once. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self.election.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.server.close()
        if self._rest is not None:
            await self._rest.drain()
        await self.roster.close()
        await self.loads.close()
        await self.demands.close()
        await self.names.close()
        await self.peers.close()
        if self._operations is not None:
            await self._operations.drain()
        await self._store.close()

    async def _or_failed(self, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait, but not for what can no longer come."""
        assert self.failed is not None
        task = asyncio.get_running_loop().create_task(waiting)
        await asyncio.wait({task, self.failed}, return_when=asyncio.FIRST_COMPLETED)
        if self.failed.done():
            task.cancel()
            self.failed.result()

    def _for_ever(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self.readiness.draining:
            return
        error = task.exception()
        log.critical("%s has ended: %r", task.get_name(), error)
        if self.failed is not None and not self.failed.done():
            self.failed.set_exception(error or RuntimeError(f"{task.get_name()} has ended"))

    def _stepped(self, touched: frozenset[str] | None) -> None:
        """The view has changed; ``touched`` is None when it was read anew as a whole."""
        self._read_live_policy()
        self.loads.view_changed()
        self.leader.wake(touched)
        if touched is None and self.readiness.synced:
            gc.collect()
            self._freeze()

    def _read_live_policy(self) -> None:
        self.live_policy.read(self.view.config.get(POLICY))

    def _use_policy(self, policy: Policy) -> None:
        """``config/policy`` has changed."""
        self.peers.use_policy(policy)
        self.loads.use_policy(policy)
        self.dispatcher.use_policy(policy)
        self.leader.use_policy(policy)
        self.oip.use_policy(policy)
        self.admin.use_policy(policy)
        self.decisions.use_policy(policy)

    def _freeze(self) -> None:
        """Take what is there now out of later collections: over a hundred thousand records a full
        one is a pause of tens of milliseconds."""
        gc.freeze()
        self._frozen_models = len(self.view.models)

    async def _watch_peers(self) -> None:
        while True:
            self.peers.watch(time.monotonic())
            await asyncio.sleep(WATCH_S)

    async def _upkeep(self) -> None:
        while True:
            await asyncio.sleep(UPKEEP_S)
            await self.peers.prune()
            if self.dataplane is not None:
                self.relay.rpcs = await asyncio.to_thread(self.dataplane.again)
            self.dispatcher.prune()
            if len(self.view.models) > _FREEZE_GROWTH * self._frozen_models + _FREEZE_MIN:
                self._freeze()
            # A load ends its own pending entry; this is for one whose end was never heard of.
            self.view.expire_pending(
                wall_clock_ms() - _PENDING_LOADS * self.live_policy.policy.load_timeout_ms
            )
            try:
                await self._store.get(LEADER_KEY)
                self._store_connected = True
            except MeshError:
                self._store_connected = False

    # ---- what it tells of itself ----------------------------------------------------------------

    def state(self) -> State:
        return State(
            ready=self.readiness.ready,
            synced=self.readiness.synced,
            draining=self.readiness.draining,
            store_connected=self._store_connected,
            instances=len(self.view.instances),
            models=len(self.view.models),
            leader=self.election.leader_id,
            view_revision=self.view.revision,
        )

    def _render(self) -> tuple[bytes, str]:
        self.dispatcher.publish_counters()
        return self.metrics.render()


async def run(settings: RouterSettings) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. A second signal ends at once."""
    store = EtcdStore(settings.etcd_options, prefix=settings.prefix, namespace=settings.namespace)
    router = Router(settings, store)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        if not await _unless(stop, router.start()):
            return 0  # told to stop while it waited for the store
        assert router.failed is not None
        failed: asyncio.Future[Any] = router.failed
        await _unless(stop, _settled(failed))
        if failed.done():
            return 1  # said so in the log already
        log.info("router %s drains", router.router_id)
        stop.clear()
        if not await _unless(stop, router.drain()):
            log.warning("told to stop again: ending at once")
            return 1
        return 0
    except OSError as error:
        log.error("cannot listen: %s", error)
        return 1
    except MeshError as error:
        log.error("router ends: %s", error.message)
        return 1
    finally:
        await router.close()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Whether the work ended before ``stop``; otherwise it is cancelled. Raises its error."""
    task = asyncio.get_running_loop().create_task(work)
    stopped = asyncio.get_running_loop().create_task(stop.wait())
    waiting: set[asyncio.Future[Any]] = {task, stopped}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


async def _settled(future: asyncio.Future[Any]) -> None:
    await asyncio.wait({future})


def main(settings: RouterSettings) -> int:
    """``run`` on uvloop, or on asyncio's own loop where uvloop is missing."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run(settings))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(settings))
