"""A reporter that keeps what it was told and lets a test wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WAIT_S = 60.0


@dataclass(slots=True)
class Recorder:
    told: list[tuple[object, ...]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def _tell(self, *what: object) -> None:
        self.told.append(what)
        self.changed.set()

    def started(self, name: str, pid: int, attempt: int) -> None:
        self._tell("started", name, attempt)

    def ready(self, name: str) -> None:
        self._tell("ready", name)

    def line(self, name: str, text: str) -> None:
        self._tell("line", name, text)

    def died(self, name: str, status: int | None, restart_in_ms: int, tail: Sequence[str]) -> None:
        self._tell("died", name, status, tuple(tail))

    def gave_up(self, name: str, status: int | None, reason: str, tail: Sequence[str]) -> None:
        self._tell("gave up", name, status, reason, tuple(tail))

    def stopping(self, name: str) -> None:
        self._tell("stopping", name)

    def killed(self, name: str, reason: str) -> None:
        self._tell("killed", name, reason)

    def all_ready(self, again: bool) -> None:
        self._tell("all ready", again)

    def of(self, kind: str) -> list[tuple[object, ...]]:
        return [item[1:] for item in self.told if item[0] == kind]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()
