"""Owns one child process of `mesh up`: its start, its signals, its output.

Output (stdout and stderr as one stream) goes to a log file of bounded size, and its last lines are
kept to be shown when the child dies. A child is started through ``tether``, so that it does not
outlive the supervisor, and in a process group of its own, so that a Ctrl-C in the terminal reaches
only the supervisor, which then stops the children in order.

It decides nothing: when to start, restart and stop is ``mesh.up.plan``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

# Three files of 4 MiB hold hours of a busy log and stay small beside one model.
LOG_FILE_MAX_BYTES: Final = 4 << 20
LOG_FILES_KEPT: Final = 3
# What is shown of a dead child's output: a traceback's end fits.
TAIL_LINES: Final = 12
# A longer line is cut: it would be a dump, not a message.
LINE_MAX_BYTES: Final = 8192
# A child's readiness document is some hundred bytes.
HTTP_ANSWER_MAX_BYTES: Final = 65_536
# How long a dead child's pipe is read on: a grandchild may still hold it open.
_PIPE_GRACE_S: Final = 1.0

ReadyCheck = Callable[[], Awaitable[bool]]
LineSeen = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ChildCommand:
    """How a child is started and how one sees that it is ready."""

    name: str
    argv: tuple[str, ...]
    ready: ReadyCheck
    log_path: Path
    start_stage: int = 0
    stop_stage: int = 0
    # Sent by the kernel when the supervisor dies without having stopped the child.
    death_signal: signal.Signals = signal.SIGKILL
    env: Mapping[str, str] = field(default_factory=dict)


class RotatingLog:
    """An append-only file that is moved aside when full: NAME, NAME.1, NAME.2."""

    def __init__(
        self, path: Path, max_bytes: int = LOG_FILE_MAX_BYTES, kept: int = LOG_FILES_KEPT
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._kept = kept
        self._file: BinaryIO = path.open("ab")
        self._size = self._file.tell()

    def write(self, data: bytes) -> None:
        """Never raises for a full disk: a log that cannot be written must not stop the mesh."""
        with contextlib.suppress(OSError):
            if self._size and self._size + len(data) > self._max_bytes:
                self._rotate()
            self._file.write(data)
            self._file.flush()
            self._size += len(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        for number in range(self._kept - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = (
                self._path.with_name(f"{self._path.name}.{number - 1}")
                if number > 1
                else self._path
            )
            if newer.exists():
                newer.replace(older)
        self._file = self._path.open("wb")
        self._size = 0


class Child:
    """One run of a ``ChildCommand``; a restart makes a new one."""

    def __init__(self, command: ChildCommand, process: asyncio.subprocess.Process) -> None:
        self.command = command
        self._process = process
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    @classmethod
    async def start(cls, command: ChildCommand) -> Child:
        """Raises OSError when not even the tether can be started."""
        tether = str(Path(__file__).with_name("tether.py"))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", tether, str(int(command.death_signal)), str(os.getpid())),
            *command.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **command.env},
            process_group=0,
        )
        return cls(command, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_lines(self) -> tuple[str, ...]:
        return tuple(self._tail)

    def signal(self, number: signal.Signals) -> None:
        """Signal the child; SIGKILL goes to its whole process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number is signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    async def run_to_end(self, on_line: LineSeen) -> int:
        """Copy the output to the log until the child has ended; its exit status."""
        log = RotatingLog(self.command.log_path)
        pump = asyncio.create_task(self._pump(log, on_line))
        try:
            status = await self._process.wait()
            await asyncio.wait({pump}, timeout=_PIPE_GRACE_S)
            return status
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            log.close()

    async def _pump(self, log: RotatingLog, on_line: LineSeen) -> None:
        assert self._process.stdout is not None
        partial = b""
        while data := await self._process.stdout.read(65_536):
            log.write(data)
            *lines, partial = (partial + data).split(b"\n")
            partial = partial[:LINE_MAX_BYTES]
            for line in lines:
                self._see(line, on_line)
        if partial:
            self._see(partial, on_line)

    def _see(self, line: bytes, on_line: LineSeen) -> None:
        text = line[:LINE_MAX_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            self._tail.append(text)
            on_line(text)


def describe_exit(status: int | None) -> str:
    """``exit status 1``, ``killed by SIGSEGV``: for people."""
    if status is None:
        return "could not be started"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


async def http_ready(host: str, port: int, path: str) -> bool:
    """Whether GET answers 200. Any failure is "not yet"."""
    return await http_get(host, port, path) is not None


async def http_get(host: str, port: int, path: str, timeout_s: float = 2.0) -> bytes | None:
    """The body of an answer with status 200; None for anything else."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                writer.write(request.encode())
                answer = await reader.read(HTTP_ANSWER_MAX_BYTES)
                while more := await reader.read(HTTP_ANSWER_MAX_BYTES):
                    answer += more
                    if len(answer) > HTTP_ANSWER_MAX_BYTES:
                        return None
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    return body if head.split(b" ")[1:2] == [b"200"] else None
