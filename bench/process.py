"""Child processes of a benchmark: pinned, waited for, measured through /proc, ended by their pid.

CPU is utime + stime of ``/proc/PID/stat`` (all threads of the process), in clock ticks of 10 ms:
a run must last several of them. Fails with ``BenchError`` that names the process and what it said.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

ROOT = Path(__file__).parents[1]
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class BenchError(Exception):
    """A measurement that cannot be trusted or made; the message says what went wrong."""


class Unavailable(BenchError):
    """A baseline that is not installed, or a part that is not built: skipped with a line."""


def serving_core() -> int:
    """The core that proxies, back ends and instances share."""
    return min(os.sched_getaffinity(0))


def load_core() -> int:
    """The core of the load generator; the same one where there is only one."""
    return max(os.sched_getaffinity(0))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Child:
    """One process. Its output goes to a file that is quoted when it dies early."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        core: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        self._process = subprocess.Popen(
            argv,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def check(self) -> None:
        """Raise when the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise BenchError(f"{self.name} ended with {code}: {self.output()[-2_000:]}")

    def wait_for_port(self, port: int, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.02)
        raise BenchError(f"{self.name} does not listen on {port} after {timeout_s:.0f} s")

    def wait_for_exit(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def pin(self, core: int) -> None:
        """Keep all of its threads on one core from now on."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {core})

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def rss_bytes(self) -> int:
        return _status_bytes(self.pid, "VmRSS")

    def peak_rss_bytes(self) -> int:
        return _status_bytes(self.pid, "VmHWM")

    def reset_peak_rss(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5", "ascii")

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def python_child(name: str, module: str, *arguments: str, core: int | None = None) -> Child:
    """``python -m module arguments`` from the tree that is measured."""
    return Child(name, [sys.executable, "-m", module, *arguments], core=core)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    text = Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace")
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def _status_bytes(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text("ascii", errors="replace").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1_024
    raise BenchError(f"/proc/{pid}/status has no {key}")


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run this process on one core for a while (children started meanwhile inherit it)."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
