"""The process of a serving pod: wires the real store, puller and runtimes in, and minds signals.

A composition root: the only module of ``mesh.instance`` that imports ``puller``'s implementation,
etcd and the runtimes. SIGTERM and SIGINT drain and end with status 0; a second one ends at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from contextlib import suppress

from mesh.core.errors import MeshError
from mesh.instance.instance import Instance
from mesh.instance.runtime_choice import choose_runtimes
from mesh.instance.settings import InstanceSettings
from mesh.store.etcd import EtcdStore
from puller.puller import Puller

log = logging.getLogger(__name__)


async def run(settings: InstanceSettings) -> int:
    """Serve until told to stop; the exit status."""
    store = EtcdStore(settings.etcd_options, prefix=settings.prefix, namespace=settings.namespace)
    try:
        chosen = await choose_runtimes(settings)
    except MeshError as error:
        log.error("no runtime: %s", error.message)
        await store.close()
        return 1
    settings = chosen.settings
    instance = Instance(settings, store, Puller(settings.puller), chosen.runtimes)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        try:
            await instance.start()
        except OSError as error:
            log.error("cannot listen: %s", error)
            return 1
        # A thread that runs Python gives way to the event loop after this long, not after 5 ms.
        sys.setswitchinterval(0.001)
        gc.collect()
        gc.freeze()  # what is there now stays: later collections need not look at it
        return await _serve(instance, stop)
    finally:
        await instance.close()
        await chosen.closable.close()
        await store.close()


async def _serve(instance: Instance, stop: asyncio.Event) -> int:
    failed = asyncio.create_task(instance.wait_failed())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
        stopped.cancel()
        try:
            failed.result()
        except* MeshError as group:
            log.error("instance ends: %s", group.exceptions[0])
        except* Exception:
            log.exception("instance ends by a defect")
        return 1
    failed.cancel()
    stop.clear()
    drain = asyncio.create_task(instance.drain())
    again = asyncio.create_task(stop.wait())
    await asyncio.wait({drain, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not drain.done():
        log.warning("told to stop again: ending at once")
        drain.cancel()
        with suppress(asyncio.CancelledError):
            await drain
        return 1
    drain.result()
    return 0


def serve(settings: InstanceSettings) -> int:
    """``run`` on uvloop, or on asyncio's own loop where uvloop is missing."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run(settings))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(settings))
