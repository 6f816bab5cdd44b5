"""The fork server of one format as the pod sees it: started when needed, and again when it dies.

Owns its process, its folder of sockets, and what it reports of its workers. The pod signals no
worker itself: only who reaps a process knows that a pid is still the same. A fork server that ends
takes its workers with it, and each of them is then told ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import orjson

from mesh.core.errors import Code, LoadFailed
from mesh.runtimes import isolated_limits
from mesh.runtimes.isolated_limits import Cause, IsolationLimits
from mesh.runtimes.isolated_proc import resident_bytes
from mesh.runtimes.isolated_protocol import FORK_SERVER_MODULE, SOCKET_NAME, Order, line
from mesh.runtimes.settings import RuntimeSettings

log = logging.getLogger(__name__)

# Importing a framework from a cold disk.
_START_TIMEOUT_S: Final = 120.0
# A fork and the first steps of a worker, on a machine that is busy.
_SPAWN_TIMEOUT_S: Final = 30.0
# A fork server that is told to end has so long.
_END_TIMEOUT_S: Final = 3.0
# Paths of Unix sockets are short; a TMPDIR that is longer than that is not used.
_TEMP_PATH_MAX: Final = 60

# What a process needs to find Python, its libraries, its devices and its language. A list of what
# is let in, and not of what is held back: nobody knows all the names that secrets have.
_ENVIRONMENT: Final = ("PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
_ENVIRONMENT_PREFIXES: Final = ("LC_", "CUDA_", "NVIDIA_", "PYTHON", "TF_", "MALLOC_", "GLIBC_")
# Threads that a library starts when it is imported would not be there after a fork.
_ONE_THREAD: Final = dict.fromkeys(
    (
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
        *("NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
    ),
    "1",
)


def worker_environment(environment: dict[str, str]) -> dict[str, str]:
    """What of the pod's environment fork servers, and so workers, are given."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    }
    import mesh

    root = str(Path(str(mesh.__file__)).parents[1])
    paths = [root, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return {**kept, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths)}


class WorkerProcess:
    """One worker. ``ended`` is done when it has been reaped, with its exit code (None: it ended
    with its fork server)."""

    __slots__ = ("_condemned", "_running", "ended", "folder", "number", "pid", "ready")

    def __init__(self, running: _Running, number: int, folder: Path) -> None:
        loop = asyncio.get_running_loop()
        self._running = running
        self._condemned: Cause | None = None
        self.number = number
        self.folder = folder
        self.pid = 0
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[int | None] = loop.create_future()

    @property
    def address(self) -> str:
        return f"unix:{self.folder / SOCKET_NAME}"

    @property
    def base_bytes(self) -> int:
        """Resident when it was forked, at most: what its fork server holds."""
        return resident_bytes(self._running.pid)

    def signal(self, number: signal.Signals) -> None:
        if not self.ended.done():
            self._running.tell({"signal": int(number), "number": self.number})

    def kill(self, cause: Cause | None = None) -> None:
        """Its end, and what it started, at once. The first cause that was given is told."""
        self._condemned = self._condemned or cause
        self.signal(signal.SIGKILL)

    @property
    def cause(self) -> Cause:
        """Why it has ended."""
        if self._condemned is not None:
            return self._condemned
        exit_code = self.ended.result()
        if exit_code is None:
            return isolated_limits.FORK_SERVER_LOST
        return isolated_limits.cause_of_exit(exit_code)


class _Running:
    """One life of a fork server."""

    def __init__(self, pid: int, folder: Path, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.folder = folder
        self.workers: dict[int, WorkerProcess] = {}
        self.serving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.over = False
        self._writer = writer
        self._numbers = 0

    def tell(self, said: dict[str, Any]) -> None:
        if not self.over:
            self._writer.write(line(said))

    def new_worker(self) -> WorkerProcess:
        self._numbers += 1
        number = self._numbers
        process = WorkerProcess(self, number, self.folder / str(number))
        self.workers[number] = process
        return process

    async def listen(self, reader: asyncio.StreamReader) -> None:
        """Until it is gone."""
        with contextlib.suppress(OSError):
            async for text in reader:
                self._heard(orjson.loads(text))
        self.over = True
        self._writer.close()
        if not self.serving.done():
            self.serving.set_exception(_no_fork_server("it ended before it served"))
            self.serving.exception()  # there may be nobody left who asks
        for process in list(self.workers.values()):
            self._ended(process, None)

    def _heard(self, said: dict[str, Any]) -> None:
        match said:
            case {"serving": _}:
                self.serving.set_result(None)
            case {"forked": number, "pid": pid}:
                self.workers[number].pid = pid
            case {"ready": number} if number in self.workers:
                ready = self.workers[number].ready
                if not ready.done():
                    ready.set_result(None)
            case {"refused": number, "cause": cause}:
                log.warning("a model's process could not be started: %s", cause)
                self._ended(self.workers[number], None)
            case {"ended": number, "exit_code": exit_code}:
                self._ended(self.workers[number], exit_code)

    def _ended(self, process: WorkerProcess, exit_code: int | None) -> None:
        del self.workers[process.number]
        if not process.ended.done():
            process.ended.set_result(exit_code)

    def hang_up(self) -> None:
        self._writer.close()


def _no_fork_server(why: str) -> LoadFailed:
    return LoadFailed(
        f"the fork server of isolated models could not be started: {why}; the instance's log has "
        "its own words",
        code=Code.UNAVAILABLE,
    )


class ForkServer:
    """``spawn`` starts it when it does not run."""

    def __init__(self, format_name: str) -> None:
        self._format = format_name
        self._running: _Running | None = None
        self._starting: asyncio.Task[_Running] | None = None
        self._lives: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int:
        """0: it does not run."""
        return 0 if self._running is None or self._running.over else self._running.pid

    async def spawn(self, settings: RuntimeSettings, limits: IsolationLimits) -> WorkerProcess:
        """A worker that serves, without a model. Raises LoadFailed (UNAVAILABLE)."""
        running = await self._started()
        process = running.new_worker()
        order = Order(
            process.number,
            process.folder,
            settings,
            threads=limits.inference_threads,
            max_message_bytes=limits.max_message_bytes,
        )
        running.tell({"spawn": order.encode()})
        try:
            first: set[asyncio.Future[Any]] = {process.ready, process.ended}
            await asyncio.wait(
                first,
                timeout=_SPAWN_TIMEOUT_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
        except asyncio.CancelledError:
            process.kill()
            await asyncio.shield(process.ended)
            raise
        if process.ended.done():
            raise LoadFailed(
                f"a process for the model could not be started: it {process.cause.text}",
                code=Code.UNAVAILABLE,
            )
        if not process.ready.done():
            process.kill()
            raise LoadFailed(
                f"a process for the model did not start within {_SPAWN_TIMEOUT_S:g} s",
                code=Code.UNAVAILABLE,
            )
        return process

    async def _started(self) -> _Running:
        if self._running is not None and not self._running.over:
            return self._running
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
            self._starting.add_done_callback(self._start_over)
        return await asyncio.shield(self._starting)

    def _start_over(self, task: asyncio.Task[_Running]) -> None:
        self._starting = None
        if not task.cancelled() and task.exception() is None:
            self._running = task.result()

    async def _start(self) -> _Running:
        folder = _new_folder()
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", FORK_SERVER_MODULE, self._format),
                *(str(theirs.fileno()), str(os.getpid()), str(folder)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # what models print belongs into the log
                pass_fds=(theirs.fileno(),),
                env=worker_environment(dict(os.environ)),
                cwd=folder,
            )
        except OSError as error:
            ours.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise _no_fork_server(error.strerror or str(error)) from None
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        running = _Running(process.pid, folder, writer)
        life = asyncio.get_running_loop().create_task(_live(running, reader, process))
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await running.serving
        except BaseException as error:
            running.hang_up()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if isinstance(error, TimeoutError):
                raise _no_fork_server(f"it did not serve after {_START_TIMEOUT_S:g} s") from None
            raise
        return running

    async def close(self) -> None:
        """Its end and that of all its workers."""
        if self._starting is not None:
            self._starting.cancel()
        if self._running is not None:
            self._running.hang_up()
        if self._lives:
            await asyncio.wait(set(self._lives))


class ForkServers:
    """One a format, made when first wanted."""

    def __init__(self) -> None:
        self._by_format: dict[str, ForkServer] = {}

    def of(self, format_name: str) -> ForkServer:
        server = self._by_format.get(format_name)
        if server is None:
            server = self._by_format[format_name] = ForkServer(format_name)
        return server

    async def close(self) -> None:
        for server in self._by_format.values():
            await server.close()


async def _live(
    running: _Running, reader: asyncio.StreamReader, process: asyncio.subprocess.Process
) -> None:
    """One life to its end: nothing is left of it, no process and no file."""
    try:
        await running.listen(reader)
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.returncode is None:  # the pod's event loop ends
                process.kill()
        shutil.rmtree(running.folder, ignore_errors=True)


def _new_folder() -> Path:
    """Only ours (0700)."""
    parent = tempfile.gettempdir()
    if len(parent) > _TEMP_PATH_MAX:
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix="mesh-workers-", dir=parent))
