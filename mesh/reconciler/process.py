"""The controller process: connects, elects, reconciles, and lets go on SIGTERM.

Order at the start: the metrics listener (so that a controller that waits can be seen waiting), the
API server's client, then informers and meshes; whoever does not lead keeps them warm and writes
nothing. On SIGTERM or SIGINT what is under way ends or is cancelled (every cut is safe), the Lease
is given up, and the process ends with 0. When a part that must run for ever ends, it ends with 1.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import socket
import time
from typing import Any

from mesh.core.errors import MeshError
from mesh.health_listener import HealthListener
from mesh.metrics import ControllerMetrics
from mesh.reconciler.controller import Controller
from mesh.reconciler.kube import ApiError, Kube, KubeConfigError
from mesh.reconciler.lease import LeaseElection
from mesh.reconciler.settings import ControllerSettings
from mesh.store.api import KVStore
from mesh.store.etcd import EtcdStore

log = logging.getLogger(__name__)

LEASE: str = "mesh-controller"


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


async def run(settings: ControllerSettings) -> int:
    """Reconcile until SIGTERM or SIGINT; the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        kube = await Kube.connect(settings.kubeconfig)
    except KubeConfigError as error:
        log.error("%s", error)
        return 1
    async with kube:
        return await _run(settings, kube, stop)


async def _run(settings: ControllerSettings, kube: Kube, stop: asyncio.Event) -> int:
    identity = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    metrics = ControllerMetrics(version=settings.software_version)
    election: LeaseElection | None = None
    controller = Controller(
        settings,
        kube,
        identity=identity,
        make_store=lambda namespace: _store(settings, namespace),
        metrics=metrics,
        leads=lambda: election is None or election.is_leader,
        now_ms=wall_clock_ms,
    )
    if settings.leader_elect:
        # Beside the pods that it is about: where a Role for one namespace reaches.
        space = settings.namespace or kube.namespace
        election = LeaseElection(kube, space, LEASE, identity, on_change=controller.leading_changed)
    health = HealthListener(metrics, controller.not_ready)
    try:
        if settings.metrics_port is not None:
            port = await health.start(settings.metrics_host, settings.metrics_port)
            log.info("metrics and health on %s:%d", settings.metrics_host, port)
        parts = [loop_task(controller.run(), "controller")]
        if election is not None:
            parts.append(loop_task(election.run(), "election"))
        return await _until(stop, parts)
    except (OSError, ApiError, MeshError) as error:
        log.error("controller ends: %s", error)
        return 1
    finally:
        await controller.close()
        if election is not None:
            await election.close()
        await health.close()


def _store(settings: ControllerSettings, namespace: str) -> KVStore:
    return EtcdStore(settings.etcd_options, prefix=settings.prefix, namespace=namespace)


def loop_task(work: Any, name: str) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work, name=name)


async def _until(stop: asyncio.Event, parts: list[asyncio.Task[Any]]) -> int:
    """0 when told to stop; 1 when a part has ended, which none should."""
    stopped = asyncio.get_running_loop().create_task(stop.wait())
    try:
        await asyncio.wait({stopped, *parts}, return_when=asyncio.FIRST_COMPLETED)
        for part in parts:
            if part.done():
                if (error := part.exception()) is not None:
                    log.error("%s ended", part.get_name(), exc_info=error)
                return 1
        log.info("told to stop")
        return 0
    finally:
        for task in (stopped, *parts):
            task.cancel()
        await asyncio.gather(stopped, *parts, return_exceptions=True)


def serve(settings: ControllerSettings) -> int:
    """``run`` on uvloop, or on asyncio's own loop where uvloop is missing."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run(settings))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(settings))
