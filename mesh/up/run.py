"""`mesh up` from start to end: lock, ports, children, the watched folder, the ready line, signals.

The composition of the parts of this package. What keeps it from starting is ``UpRefused``; what
goes wrong later is told at the terminal while the rest goes on.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from mesh.folder_sync import Applier, FolderSync
from mesh.up.assembly import Assembly, assemble
from mesh.up.child import http_get
from mesh.up.layout import DataDir, UpRefused, locked
from mesh.up.settings import Addresses, UpSettings
from mesh.up.supervisor import Supervisor
from mesh.up.terminal import Terminal

SCAN_PERIOD_S: Final = 1.0
_SAME_PRESS_S: Final = 0.5
_KNOWN_POLL_S: Final = 0.05


class Front(Protocol):
    """The mesh as a client sees it, made when all is ready; the command line implements it."""

    def applier(self, address: str, storage_config: Path) -> Applier:
        """``storage_config``: where the storage secret is written to."""

    def request_to_paste(
        self, addresses: Addresses, models: Sequence[str], folder: Path | None
    ) -> str:
        """A few lines that a person can paste. Never raises; may take seconds."""

    def capacity_text(self, capacity_bytes: int) -> str: ...


def run_up(settings: UpSettings, front: Front, terminal: Terminal | None = None) -> int:
    """Until stopped; the exit status. Raises UpRefused."""
    if settings.models is not None and not settings.models.is_dir():
        raise UpRefused(f"--models {settings.models}: no such folder")
    data_dir = DataDir(settings.data_dir)
    with locked(data_dir):
        return asyncio.run(_run(settings, front, data_dir, terminal or Terminal(settings.verbose)))


async def _run(settings: UpSettings, front: Front, data_dir: DataDir, terminal: Terminal) -> int:
    assembly = await asyncio.to_thread(assemble, settings, data_dir)
    if assembly.etcd is not None and assembly.etcd.caution:
        terminal.write(f"note: {assembly.etcd.caution}")
    terminal.write(f"starting {_parts(settings, assembly)}; logs in {data_dir.logs}/")
    supervisor = Supervisor(assembly.commands, terminal)
    StopRequests(supervisor, time.monotonic).listen(asyncio.get_running_loop())
    announce = asyncio.create_task(
        _when_ready(settings, front, data_dir, terminal, supervisor, assembly)
    )
    try:
        clean = await supervisor.run()
    finally:
        announce.cancel()
        await asyncio.gather(announce, return_exceptions=True)
    terminal.write("stopped")
    return 0 if clean else 1


class Stoppable(Protocol):
    def ask_stop(self) -> None: ...

    def ask_kill(self) -> None: ...


class StopRequests:
    """What the signals mean: the first stops, a second Ctrl-C kills.

    A Ctrl-C can arrive twice at once (from the terminal and from a wrapper that passes it on):
    only one that comes ``_SAME_PRESS_S`` later is a second one.
    """

    def __init__(self, supervisor: Stoppable, now: Callable[[], float]) -> None:
        self._supervisor = supervisor
        self._now = now
        self._first_at: float | None = None

    def ask(self, *, impatient: bool) -> None:
        now = self._now()
        if self._first_at is None:
            self._first_at = now
            self._supervisor.ask_stop()
        elif impatient and now - self._first_at >= _SAME_PRESS_S:
            self._supervisor.ask_kill()

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_signal_handler(signal.SIGINT, lambda: self.ask(impatient=True))
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, lambda: self.ask(impatient=False))


async def _when_ready(
    settings: UpSettings,
    front: Front,
    data_dir: DataDir,
    terminal: Terminal,
    supervisor: Supervisor,
    assembly: Assembly,
) -> None:
    await supervisor.ready.wait()
    try:
        await all_known(assembly.addresses.router_metrics, settings.instances)
        sync = None
        if settings.models is not None:
            sync = FolderSync(
                settings.models.resolve(),  # as the instances know it, who may read only there
                data_dir.folder_state,
                front.applier(assembly.addresses.grpc, assembly.storage_config),
                terminal,
            )
            if not await asyncio.to_thread(sync.step):
                # Files of the last moments (samples just made) are complete if they stay as they
                # are for one scan: the ready line should count them.
                await asyncio.sleep(SCAN_PERIOD_S)
                await asyncio.to_thread(sync.step)
        await _announce(settings, front, terminal, assembly, sync)
        while sync is not None:
            await asyncio.sleep(SCAN_PERIOD_S)
            await asyncio.to_thread(sync.step)
    except Exception as error:
        # The mesh serves without its folder; that it is not watched any more must be known.
        terminal.write(f"ERROR: the models folder is not watched any more: {error!r}")
        raise


async def all_known(router_metrics: Sequence[str], instances: int) -> None:
    """Until each router's view has as many instances: one that is ready has told the store, and a
    router hears of it a moment later. The first request must not come in between."""
    for address in router_metrics:
        host, _, port = address.rpartition(":")
        while True:
            if await _instances_known(host.strip("[]"), int(port)) >= instances:
                break
            await asyncio.sleep(_KNOWN_POLL_S)


async def _instances_known(host: str, port: int) -> int:
    body = await http_get(host, port, "/readyz")
    try:
        known = json.loads(body or b"{}").get("instances", 0)
    except (ValueError, AttributeError):
        return 0
    return known if isinstance(known, int) else 0


async def _announce(
    settings: UpSettings,
    front: Front,
    terminal: Terminal,
    assembly: Assembly,
    sync: FolderSync | None,
) -> None:
    names = sorted(sync.names) if sync is not None else []
    addresses = assembly.addresses
    paste = await asyncio.to_thread(front.request_to_paste, addresses, names, settings.models)
    registered = f", {len(names)} models from {settings.models}" if sync is not None else ""
    lines = [
        f"mesh is ready: gRPC {addresses.grpc}, REST {addresses.rest}{registered}",
        f"  instances  {settings.instances} x {front.capacity_text(settings.capacity_bytes)}",
        f"  metrics    {', '.join((*addresses.router_metrics, *addresses.instance_metrics))}",
        f"  etcd       {', '.join(addresses.etcd)}",
        f"  data       {settings.data_dir}",
        "",
        paste,
    ]
    sys.stdout.write("\n".join(lines).rstrip() + "\n")
    sys.stdout.flush()


def _parts(settings: UpSettings, assembly: Assembly) -> str:
    etcd = f"etcd {assembly.etcd.version_text}, " if assembly.etcd is not None else ""
    return f"{etcd}{_count(settings.routers, 'router')}, {_count(settings.instances, 'instance')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
