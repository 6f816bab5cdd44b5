"""One isolated model: its process, and the next one when that dies.

A process that ends by itself, is killed, takes too much or too long costs the requests inside it,
which hear why. Another one loads the model meanwhile; new requests wait for it. A model that does
that ``crashes_max`` times within ``crash_window_ms`` is given up: it is ``ModelLost``, and the mesh
drops the copy. So is one whose files are gone when they are wanted again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
from collections import deque
from collections.abc import Callable, Coroutine
from time import monotonic, time
from typing import Any, Final

from mesh.core.batching import Wished
from mesh.core.errors import Code, LoadFailed, MeshError
from mesh.core.policy import Policy
from mesh.runtimes import isolated_limits
from mesh.runtimes.api import ModelLost, ModelMetadata, ModelSpec, ProcessEnds
from mesh.runtimes.isolated_channel import WorkerChannel, WorkerEnded
from mesh.runtimes.isolated_fork_server import ForkServer, WorkerProcess
from mesh.runtimes.isolated_limits import Cause, IsolationLimits
from mesh.runtimes.isolated_proc import descendants, private_bytes
from mesh.runtimes.isolated_protocol import (
    LOAD_PATH,
    TERMS_PATH,
    load_request,
    loaded_metadata,
    terms_message,
)
from mesh.runtimes.isolated_watch import Watch
from mesh.runtimes.settings import RuntimeSettings
from mesh.wire.client import Channel, RpcError

log = logging.getLogger(__name__)

# The first replacement comes at once; what dies again at once must not keep the machine busy.
_BACKOFF_S: Final = (0.0, 0.5, 2.0)


class IsolatedModel:
    """``mesh.runtimes.api.RemoteModel``. ``await start()`` first; in the event loop."""

    internal = True

    def __init__(
        self,
        spec: ModelSpec,
        server: ForkServer,
        settings: RuntimeSettings,
        limits: IsolationLimits,
        *,
        on_fresh: Callable[[int], None],
        on_closed: Callable[[], None],
    ) -> None:
        """``on_fresh`` hears how many bytes a worker has of its own before it loads."""
        self._spec = spec
        self._server = server
        self._settings = settings
        self._limits = limits
        self._on_fresh = on_fresh
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._process: WorkerProcess | None = None
        self._watch: Watch | None = None
        self._crashes: deque[float] = deque(maxlen=limits.crashes_max)
        self._replacing: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._control: Channel | None = None  # to its process now
        self._terms: bytes | None = None
        self._closing = False
        self.metadata: ModelMetadata | None = None
        self.size_bytes = 0
        own = spec.options.max_concurrency or limits.requests_max
        self.max_concurrency = min(own, limits.requests_max)
        self.ends = ProcessEnds()
        self.channel = WorkerChannel(
            spec.model_id,
            max_message_bytes=limits.max_message_bytes,
            wait_s=limits.replacing_wait_ms / 1e3,
            on_busy=self._busy,
        )

    @property
    def model_id(self) -> str:
        return self._spec.model_id

    @property
    def pid(self) -> int:
        """Of its process now; 0: there is none."""
        process = self._process
        return process.pid if process is not None and not process.ended.done() else 0

    # ---- requests ----

    def admit(self, path: str) -> MeshError | None:
        return None

    def request(self, path: str, message: bytes) -> bytes:
        return message

    def reply(self, path: str, message: bytes, client_name: str) -> bytes:
        """The worker answers under the client's name: it is told by the same headers as we are."""
        return message

    def error(self, path: str, error: RpcError) -> MeshError:
        if isinstance(error, WorkerEnded) and error.lost:
            return ModelLost(error.message)
        return error

    def use_terms(self, record: Wished, policy: Policy) -> None:
        """Told to its process now, and to those that follow."""
        terms = terms_message(record, policy)
        if terms == self._terms:
            return
        self._terms = terms
        if self._control is not None and self.pid:
            self._spawn(self._tell_terms(self._control))

    async def _tell_terms(self, control: Channel) -> None:
        """Until they are the ones that hold. A process that dies meanwhile has others to tell."""
        told = None
        with contextlib.suppress(MeshError):
            while self._terms is not None and told != self._terms:
                told = self._terms
                await control.unary(TERMS_PATH, told)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _busy(self) -> None:
        if self._watch is not None:
            self._watch.hurry()

    # ---- a process for it ----

    async def start(self) -> None:
        """Raises LoadFailed; then no process is left."""
        process = await self._bring_up()
        self._serve(process)

    async def _bring_up(self) -> WorkerProcess:
        process = await self._server.spawn(self._settings, self._limits)
        process.ended.add_done_callback(lambda _: self._remove_folder(process))
        control = Channel(process.address)
        watch = Watch(process, control, self._limits, lambda: self.channel.in_flight)
        process.ended.add_done_callback(lambda _: control.peer.abort())
        self._on_fresh(private_bytes(process.pid))
        try:
            self.metadata = await self._load(process, control)
            await self._tell_terms(control)
            watch.loaded()
        except BaseException:
            process.kill()
            await asyncio.shield(process.ended)
            raise
        family = [process.pid, *descendants(process.pid)]
        self.size_bytes = max(1, sum(map(private_bytes, family)))
        self._watch = watch
        self._control = control
        return process

    async def _load(self, process: WorkerProcess, control: Channel) -> ModelMetadata:
        call = self._loop.create_task(control.unary(LOAD_PATH, load_request(self._spec)))
        timeout_ms = self._limits.load_timeout_ms
        first: set[asyncio.Future[Any]] = {call, process.ended}
        try:
            done, _ = await asyncio.wait(
                first,
                timeout=timeout_ms / 1e3,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                process.kill(isolated_limits.load_took_too_long(timeout_ms))
                await asyncio.shield(process.ended)
            if not process.ended.done():
                try:
                    return loaded_metadata(call.result().message)
                except RpcError as error:
                    if error.trailers:  # the runtime's own words
                        raise LoadFailed(error.message, code=error.code) from None
                process.kill()  # the connection broke: most likely it has ended already
                await asyncio.shield(process.ended)
        finally:
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError, MeshError):
                await call
        cause = process.cause
        raise LoadFailed(
            f"model {self._spec.model_id!r} could not be loaded: its process {cause.text}",
            code=cause.load_code,
        )

    def _serve(self, process: WorkerProcess) -> None:
        self._process = process
        self.channel.up(process.address)
        process.ended.add_done_callback(lambda _: self._ended(process))

    def _remove_folder(self, process: WorkerProcess) -> None:
        self._spawn(asyncio.to_thread(shutil.rmtree, process.folder, ignore_errors=True))

    # ---- replacement ----

    def _ended(self, process: WorkerProcess) -> None:
        if self._closing:
            return
        cause = process.cause
        self.ends = ProcessEnds(self.ends.count + 1, round(time() * 1e3), cause.text)
        text = f"model {self._spec.model_id!r}: its process {cause.text}"
        if self._held_against(cause):
            self._give_up(text)
            return
        log.warning("%s; it is brought back", text)
        self.channel.down(WorkerEnded(cause.code, text))
        self._replacing = self._loop.create_task(self._replace())

    def _held_against(self, cause: Cause) -> bool:
        """Whether it is too much."""
        if cause.model_at_fault:
            self._crashes.append(monotonic())
        return self._too_often()

    def _too_often(self) -> bool:
        crashes, window_s = self._crashes, self._limits.crash_window_ms / 1e3
        return len(crashes) == crashes.maxlen and monotonic() - crashes[0] <= window_s

    def _give_up(self, text: str) -> None:
        why = (
            f"{text}; that was the {self._limits.crashes_max}. time within "
            f"{self._limits.crash_window_ms / 1e3:g} s"
            if self._too_often()
            else text
        )
        log.error("%s: the model is given up here", why)
        self.channel.refuse(WorkerEnded(Code.UNAVAILABLE, why, lost=True))

    async def _replace(self) -> None:
        """Each failure counts as another end."""
        attempt = max(0, len(self._crashes) - 1)
        while True:
            await asyncio.sleep(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])
            try:
                process = await self._bring_up()
            except LoadFailed as error:
                attempt += 1
                self._crashes.append(monotonic())
                if self._too_often() or not self._spec.path.exists():
                    self._give_up(error.message)
                    return
                log.warning("%s; it is tried again", error.message)
                continue
            log.info("model %r is back", self._spec.model_id)
            self._serve(process)
            return

    # ---- unload ----

    def unload(self) -> None:
        asyncio.run_coroutine_threadsafe(self.close(), self._loop).result()

    async def close(self) -> None:
        """Returns when its process is gone."""
        self._closing = True
        if self._replacing is not None:
            self._replacing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._replacing
        text = f"model {self._spec.model_id!r} was unloaded"
        self.channel.refuse(WorkerEnded(Code.UNAVAILABLE, text, lost=True))
        process = self._process
        if process is not None and not process.ended.done():
            process.signal(signal.SIGTERM)
            await asyncio.wait({process.ended}, timeout=self._limits.unload_timeout_ms / 1e3)
            process.kill()
            await process.ended
        if self._background:
            await asyncio.wait(set(self._background))
        self._on_closed()
