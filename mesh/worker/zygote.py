"""The fork server of one model format: imports the framework once, then forks a worker for each
model. ``python -m mesh.worker.zygote FORMAT CONTROL_FD PARENT_PID FOLDER``.

Orders come from the pod over a socket pair, reports go back: a worker was forked, serves, has
ended, and by what. It is single threaded, runs no model and no event loop, so that a fork copies
nothing that could be locked. It ends when the pod closes the socket, which the pod's death does
too, and takes all workers and what they started with it; when it is killed itself, the kernel ends
the workers.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson

from mesh.runtimes.isolated_protocol import Order, line
from mesh.worker import confinement, serving
from mesh.worker.preload import preload

_READ_BYTES: Final = 64 * 1024
# A worker that ends by an exception of ours; the traceback is on its standard error.
_DEFECT_STATUS: Final = 70


class ForkServer:
    """``control`` is the socket to the pod."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, int] = {}  # number to pid, until reaped
        self._unread = b""
        self._ending = False

    def run(self) -> None:
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_r, False)
        os.set_blocking(wake_w, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._terminated)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        self._watch(self._control.fileno(), self._orders)
        self._watch(wake_r, partial(self._reap, wake_r))
        self._tell({"serving": os.getpid()})
        while not self._ending:
            for key, _ in self._selector.select():
                key.data()
        self._end_all()

    def _watch(self, fd: int, act: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, act)

    def _terminated(self, *_: Any) -> None:
        self._ending = True

    def _tell(self, said: dict[str, Any]) -> None:
        try:
            self._control.sendall(line(said))
        except OSError:  # the pod is gone
            self._ending = True

    # ---- orders ----

    def _orders(self) -> None:
        try:
            data = self._control.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            self._ending = True
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for text in lines:
            said = orjson.loads(text)
            if "spawn" in said:
                self._spawn(Order.decode(said["spawn"]))
            else:
                self._signal(said["signal"], said["number"])

    def _signal(self, number: int, worker: int) -> None:
        """To the whole group; a pid that was not reaped belongs to nobody else."""
        pid = self._workers.get(worker)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            if number == signal.SIGKILL:
                os.killpg(pid, number)

    def _spawn(self, order: Order) -> None:
        order.folder.mkdir(mode=0o700)
        ready_r, ready_w = os.pipe()
        parent_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(ready_r)
            os.close(ready_w)
            self._tell({"refused": order.number, "cause": f"fork failed: {error.strerror}"})
            return
        if pid == 0:
            try:
                confinement.confine(order.folder, ready_w, parent_pid)
                serving.run(order, ready_w)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(_DEFECT_STATUS)
        os.close(ready_w)
        self._workers[order.number] = pid
        self._watch(ready_r, partial(self._ready, ready_r, order.number))
        self._tell({"forked": order.number, "pid": pid})

    def _ready(self, fd: int, worker: int) -> None:
        """The worker serves, or has closed its end by ending."""
        self._selector.unregister(fd)
        served = os.read(fd, 1)
        os.close(fd)
        if served:
            self._tell({"ready": worker})

    # ---- ends ----

    def _reap(self, wake_fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(wake_fd, 4_096)
        numbers = {pid: number for number, pid in self._workers.items()}
        while (ended := self._next_ended()) is not None:
            number = numbers.get(ended)
            if number is not None:  # first its group, while its pid cannot be anybody else's
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(ended, signal.SIGKILL)
            _, status = os.waitpid(ended, 0)
            if number is None:
                continue
            del self._workers[number]
            code = os.waitstatus_to_exitcode(status)
            self._tell({"ended": number, "exit_code": code})
        for stray in confinement.stray_children(set(self._workers.values())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(stray, signal.SIGKILL)

    def _next_ended(self) -> int | None:
        """Its pid; it is left unreaped."""
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return None
        return found.si_pid if found is not None else None

    def _end_all(self) -> None:
        for pid in self._workers.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                os.killpg(pid, signal.SIGKILL)
        for pid in self._workers.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        for stray in confinement.stray_children(set()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(stray, signal.SIGKILL)


def main() -> None:
    format_name, control_fd, parent_pid, folder = sys.argv[1:5]
    confinement.die_with_parent(int(parent_pid), signal.SIGTERM)
    confinement.adopt_orphans()
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s worker %(name)s: %(message)s")
    control = socket.socket(fileno=int(control_fd))
    os.set_inheritable(control.fileno(), False)
    try:
        preload(format_name)
        gc.collect()
        gc.freeze()  # a collection in a worker touches nothing that it shares
        ForkServer(control).run()
    finally:
        shutil.rmtree(Path(folder), ignore_errors=True)


if __name__ == "__main__":
    main()
