"""One serving pod, put together: the parts, their order of starting and of leaving.

Knows no etcd, no object store and no framework by name: those are handed in, so that tests run the
same object on a store in memory. ``process.py`` is the process around it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Final

from mesh.artifacts import ArtifactSource
from mesh.core.cache_table import CacheConfig
from mesh.core.live_config import POLICY
from mesh.core.policy import Policy
from mesh.core.types import InstanceRecord, InstanceState
from mesh.decision_log import DecisionLog
from mesh.health_listener import HealthListener
from mesh.instance.carrier import Carrier
from mesh.instance.clock import Clock
from mesh.instance.drainer import Drainer
from mesh.instance.executor import Executor
from mesh.instance.handlers import instance_methods
from mesh.instance.inference import Inference
from mesh.instance.loader import Runtimes
from mesh.instance.membership import Membership
from mesh.instance.model_info import ModelInfo
from mesh.instance.pod import Pod
from mesh.instance.publisher import Publisher
from mesh.instance.scaler import Scaler
from mesh.instance.settings import InstanceSettings
from mesh.live_policy import LivePolicy
from mesh.metrics import InstanceMetrics
from mesh.store.api import KVStore
from mesh.wire.server import Server, Streaming

log = logging.getLogger(__name__)

# Requests a minute are taken over at least so long.
RATE_WINDOW_MS: Final = 10_000
# Of the time for a drain, what moves of copies leave to the requests in flight: a third, at most
# so long.
DRAIN_RESERVE_MS: Final = 5_000
# Taking the record away may last so long; else the lease runs out by itself.
LEAVE_TIMEOUT_S: Final = 2.0


class Instance:
    """``await start()``, then it serves until ``await drain()``."""

    def __init__(
        self,
        settings: InstanceSettings,
        store: KVStore,
        source: ArtifactSource,
        runtimes: Runtimes,
    ) -> None:
        self.settings = settings
        self.instance_id = f"{settings.name}-{secrets.token_hex(4)}"
        self.state = InstanceState.STARTING
        self.clock = Clock()
        self.metrics = InstanceMetrics(
            version=settings.software_version, per_model=settings.per_model_metrics
        )
        self.decisions = DecisionLog(
            now_ms=self.clock.now_ms,
            counted=lambda kind, reason: self.metrics.counter("decisions", kind, reason),
            kept=settings.policy.decisions_kept,
        )
        self.publisher = Publisher(store, self.instance_id)
        self.pod = Pod(
            self.instance_id,
            CacheConfig.from_policy(settings.policy, settings.capacity_bytes),
            settings.policy,
            store,
            self.publisher,
            source,
            runtimes,
            self.metrics,
            self.clock,
            self.decisions,
        )
        self.neighbours = self.pod.neighbours
        self.executor = Executor(
            settings.policy,
            settings.inference_threads,
            self.metrics,
            self.clock.offset_ms,
            on_idle=self.pod.became_idle,
            idle_wanted=self.pod.idle_wanted,
            on_lost=self.pod.lost,
            on_batching=self.pod.batching_changed,
        )
        self.carrier = Carrier(
            settings.policy,
            self.metrics,
            self.clock.offset_ms,
            on_idle=self.pod.became_idle,
            idle_wanted=self.pod.idle_wanted,
            on_lost=self.pod.lost,
        )
        self.inference = Inference(self.pod.servables, self.executor, self.carrier)
        self.info = ModelInfo(
            self.pod.servables,
            settings.software_version,
            lambda: not self.not_ready(),
            self.carrier,
        )
        self.server = Server(
            instance_methods(self.pod, self.inference, self.info),
            limits=settings.limits,
            otherwise=Streaming(self.inference.any_method, self.inference.accept),
        )
        self.health = HealthListener(self.metrics, self.not_ready)
        self.membership = Membership(self.pod, store, self.publisher, self.clock, self.record)
        self.scaler = Scaler(self.pod, self.neighbours, settings.policy, self.clock, self.decisions)
        self.live_policy = LivePolicy(settings.policy, self.use_policy, self.decisions)
        self.neighbours.on_config = self._config_read
        self.address = ""
        self.metrics_address = ""
        self._store = store
        self._source = source
        self._runtimes = runtimes
        self._started_at_ms = self.clock.now_ms()
        self._rate = (self._started_at_ms, 0, 0)  # since when, requests then, requests a minute
        self._member: asyncio.Task[None] | None = None
        self._gauges()

    async def start(self) -> None:
        """Listen and begin to join; ``membership.joined`` is set when the store knows of us."""
        settings = self.settings
        if settings.metrics_port is not None:
            port = await self.health.start(settings.metrics_host, settings.metrics_port)
            self.metrics_address = _address(settings.metrics_host, port)
        port = await self.server.start(settings.host, settings.port)
        self.address = _address(settings.advertised_host or settings.host, port)
        self.state = InstanceState.READY
        self._member = asyncio.create_task(self._run_membership(), name="membership")
        log.info(
            "instance %s serves on %s, metrics on %s, %d bytes for models",
            self.instance_id,
            self.address,
            self.metrics_address or "no port",
            settings.capacity_bytes,
        )

    async def _run_membership(self) -> None:
        await self._store.wait_ready()
        await self.membership.run(self.neighbours.run(), self.scaler.run())

    async def wait_failed(self) -> None:
        """Return only when a part that has to run has ended; raises what ended it."""
        assert self._member is not None
        await asyncio.wait({self._member})
        self._member.result()

    def use_policy(self, policy: Policy) -> None:
        """From now on; what the listener and the threads were made with stays."""
        config = CacheConfig.from_policy(policy, self.settings.capacity_bytes)
        self.pod.use_policy(policy, config)
        self.executor.use_policy(policy)
        self.carrier.use_policy(policy)
        self.scaler.use_policy(policy)
        self.decisions.use_policy(policy)

    def _config_read(self) -> None:
        self.live_policy.read(self.neighbours.view.config.get(POLICY))

    async def drain(self) -> None:
        """Leave without losing a request: say so, have others load what is in use here and serve
        on meanwhile, refuse, let those in flight finish, take the record and the copies away."""
        settings = self.settings
        log.info("instance %s is draining", self.instance_id)
        loop = asyncio.get_running_loop()
        self.state = InstanceState.DRAINING
        self.pod.drain()
        self.membership.advertise()
        notice_s = settings.drain_notice_ms / 1_000
        until_s = loop.time() + notice_s + settings.drain_timeout_ms / 1_000
        if self.membership.joined.is_set():
            heard_s = notice_s if self.publisher.connected else 0.0
            await asyncio.gather(asyncio.sleep(heard_s), self._move_copies(until_s))
        self.inference.draining = True
        await self.server.drain(max(0.0, until_s - loop.time()))
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await self.membership.leave()
        except TimeoutError:
            log.warning("the store did not answer; the lease will run out by itself")
        await self.close()
        log.info("instance %s has left", self.instance_id)

    async def _move_copies(self, until_s: float) -> None:
        timeout_ms, notice_ms = self.settings.drain_timeout_ms, self.settings.drain_notice_ms
        reserve_ms = min(DRAIN_RESERVE_MS, timeout_ms // 3) + notice_ms
        left_s = until_s - asyncio.get_running_loop().time() - reserve_ms / 1_000
        drainer = Drainer(self.pod, self.publisher, self.clock, self.decisions)
        await drainer.run(max(0.0, left_s))
        if drainer.moved:
            await asyncio.sleep(notice_ms / 1_000)  # routers hear of the last of them

    async def close(self) -> None:
        """End everything now. Idempotent."""
        if self._member is not None:
            self._member.cancel()
            await asyncio.gather(self._member, return_exceptions=True)
        await self.server.close()
        await self.health.close()
        await self.pod.close()
        self.executor.close()
        await self._source.close()

    # ---- what it says of itself ----

    def not_ready(self) -> str:
        if self.state is InstanceState.DRAINING:
            return "draining"
        if not self.membership.joined.is_set():
            return "waiting for the store"
        return ""

    def record(self) -> InstanceRecord:
        cache = self.pod.cache
        return InstanceRecord(
            instance_id=self.instance_id,
            address=self.address,
            state=self.state,
            capacity_bytes=cache.config.capacity_bytes,
            used_bytes=cache.used_bytes,
            model_count=len(self.pod.servables),
            loading_count=cache.loading_count,
            load_slots=cache.config.load_slots,
            lru_at_ms=cache.oldest_use_at_ms(),
            requests_per_minute=self._requests_per_minute(),
            started_at_ms=self._started_at_ms,
            model_types=tuple(self._runtimes.model_types),
            zone=self.settings.zone,
            victim_score=cache.victim_score(self.clock.now_ms()),
            labels=self.settings.labels,
            group=self.settings.group,
            replica_set=self.settings.replica_set,
            metrics_address=self.metrics_address,
            software_version=self.settings.software_version,
        )

    def _requests_per_minute(self) -> int:
        since_ms, count, rate = self._rate
        now_ms = self.clock.now_ms()
        requests = self.executor.requests + self.carrier.requests
        if now_ms - since_ms >= RATE_WINDOW_MS:
            rate = round((requests - count) * 60_000 / (now_ms - since_ms))
            self._rate = (now_ms, requests, rate)
        return rate

    def _gauges(self) -> None:
        cache, metrics = self.pod.cache, self.metrics
        metrics.gauge("capacity_bytes", cache.config.capacity_bytes)
        metrics.gauge_source("used_bytes", lambda: cache.used_bytes)
        metrics.gauge_source("models_total", lambda: len(self.pod.servables))
        metrics.gauge_source("loading", lambda: cache.loading_count)
        metrics.gauge_source("queued", lambda: self.executor.queued + self.carrier.queued)
        metrics.gauge_source("inflight", lambda: self.executor.busy + self.carrier.busy)
        metrics.gauge_source("connections", lambda: self.server.connections)
        metrics.gauge_source("store_connected", lambda: float(self.publisher.connected))
        metrics.gauge_source("lru_seconds", lambda: cache.oldest_use_at_ms() / 1_000 or None)
        metrics.gauge_source("lru_age_seconds", self._lru_age_seconds)

    def _lru_age_seconds(self) -> float | None:
        oldest = self.pod.cache.oldest_use_at_ms()
        return (self.clock.now_ms() - oldest) / 1_000 if oldest else None


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
