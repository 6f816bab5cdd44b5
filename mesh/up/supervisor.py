"""Runs the children of `mesh up`: carries out what ``mesh.up.plan`` decides.

A thin loop: events (a child became ready, a child ended, a signal came, time passed) go into
``Supervision.handle`` and the instructions that come back are carried out. What a person should
know goes to a ``Reporter``. It never raises for a child's death.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from typing import Final, Protocol, assert_never

from mesh.up.child import Child, ChildCommand
from mesh.up.plan import (
    AllReady,
    BecameReady,
    Begin,
    ChildSpec,
    Event,
    Exited,
    Finished,
    GaveUp,
    Instruction,
    Kill,
    KillAsked,
    RestartPolicy,
    Start,
    StopAsked,
    Supervision,
    Terminate,
    Tick,
    WillRestart,
)

# Readiness is asked for this often at first, and a little less often the longer it takes.
_POLL_FIRST_S: Final = 0.05
_POLL_MAX_S: Final = 0.5


class Reporter(Protocol):
    """What the person at the terminal is told. Must not block."""

    def started(self, name: str, pid: int, attempt: int) -> None: ...

    def ready(self, name: str) -> None: ...

    def line(self, name: str, text: str) -> None:
        """One line of a child's output."""

    def died(self, name: str, status: int | None, restart_in_ms: int, tail: Sequence[str]) -> None:
        """It is started again. ``tail`` is the end of its output."""

    def gave_up(self, name: str, status: int | None, reason: str, tail: Sequence[str]) -> None:
        """It is not started again, and everything stops."""

    def stopping(self, name: str) -> None: ...

    def killed(self, name: str, reason: str) -> None: ...

    def all_ready(self, again: bool) -> None: ...


class Supervisor:
    """All the children of one `mesh up`. ``run`` once; ``ask_stop`` and ``ask_kill`` any time."""

    def __init__(
        self,
        commands: Sequence[ChildCommand],
        reporter: Reporter,
        policy: RestartPolicy | None = None,
    ) -> None:
        self._commands = {command.name: command for command in commands}
        self._reporter = reporter
        self._plan = Supervision(
            (ChildSpec(c.name, c.start_stage, c.stop_stage) for c in commands), policy
        )
        # Unbounded in type only: a child has at most one ready and one exit event under way.
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._running: dict[str, Child] = {}
        self._tails: dict[str, tuple[str, ...]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._doomed: set[str] = set()  # to be killed, also when its start is still under way
        self._failed: bool | None = None
        self.ready = asyncio.Event()  # set when all children were ready for the first time

    def ask_stop(self) -> None:
        self._events.put_nowait(StopAsked())

    def ask_kill(self) -> None:
        self._events.put_nowait(KillAsked())

    def pid(self, name: str) -> int | None:
        """The process id of a child that runs now."""
        child = self._running.get(name)
        return None if child is None else child.pid

    async def run(self) -> bool:
        """Until everything has stopped. False when a child's refusal was the cause."""
        self._events.put_nowait(Begin())
        try:
            while self._failed is None:
                for instruction in self._plan.handle(await self._next_event(), _now_ms()):
                    self._carry_out(instruction)
        finally:
            await self._clear()
        return not self._failed

    async def _next_event(self) -> Event:
        due_ms = self._plan.next_due_ms()
        if due_ms is None:
            return await self._events.get()
        try:
            async with asyncio.timeout(max(0, due_ms - _now_ms()) / 1000):
                return await self._events.get()
        except TimeoutError:
            return Tick()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Start(name, attempt):
                self._tasks[name] = asyncio.create_task(self._live(name, attempt))
            case Terminate(name):
                self._reporter.stopping(name)
                self._signal(name, signal.SIGTERM)
            case Kill(name, reason):
                self._reporter.killed(name, reason)
                self._doomed.add(name)
                self._signal(name, signal.SIGKILL)
            case WillRestart(name, status, delay_ms):
                self._reporter.died(name, status, delay_ms, self._tails.get(name, ()))
            case GaveUp(name, status, reason):
                self._reporter.gave_up(name, status, reason, self._tails.get(name, ()))
            case AllReady(again):
                self._reporter.all_ready(again)
                self.ready.set()
            case Finished(failed):
                self._failed = failed
            case _:
                assert_never(instruction)

    def _signal(self, name: str, number: signal.Signals) -> None:
        child = self._running.get(name)
        if child is not None:
            child.signal(number)

    async def _live(self, name: str, attempt: int) -> None:
        """One run of a child from start to end; reports both ends as events."""
        command = self._commands[name]
        try:
            child = await Child.start(command)
        except OSError as error:
            self._tails[name] = (str(error),)
            self._events.put_nowait(Exited(name, None))
            return
        self._running[name] = child
        self._reporter.started(name, child.pid, attempt)
        poll = asyncio.create_task(self._await_ready(command))
        try:
            if self._plan.stopping:  # the order came while the process was being made
                child.signal(signal.SIGKILL if name in self._doomed else signal.SIGTERM)
            status = await child.run_to_end(lambda text: self._reporter.line(name, text))
        finally:
            poll.cancel()
            child.signal(signal.SIGKILL)  # nothing of its process group stays behind
            self._tails[name] = child.last_lines
            del self._running[name]
        await asyncio.gather(poll, return_exceptions=True)
        self._events.put_nowait(Exited(name, status))

    async def _await_ready(self, command: ChildCommand) -> None:
        pause_s = _POLL_FIRST_S
        while not await command.ready():
            await asyncio.sleep(pause_s)
            pause_s = min(_POLL_MAX_S, pause_s * 1.3)
        self._reporter.ready(command.name)
        self._events.put_nowait(BecameReady(command.name))

    async def _clear(self) -> None:
        """Leave nothing behind, also when ``run`` itself was cancelled."""
        for child in self._running.values():
            child.signal(signal.SIGKILL)
        for task in self._tasks.values():
            if not task.done():
                # Each ends by itself once its process is gone; the bound is for a defect of ours.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(task, timeout=5)


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
