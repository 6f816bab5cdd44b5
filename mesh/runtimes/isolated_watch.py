"""Watches one worker process: its memory, and whether it still comes back from what it does.

Memory is the resident set of the worker and of what it has started, looked at often while it loads
or is busy. Whether it hangs is asked with a Ping: how long inferences have been inside, and whether
the event loop answers at all. Ends the process with a cause; who asked for it learns that from the
process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Final

from mesh.core.errors import MeshError
from mesh.runtimes import isolated_limits
from mesh.runtimes.isolated_fork_server import WorkerProcess
from mesh.runtimes.isolated_limits import IsolationLimits
from mesh.runtimes.isolated_proc import (
    cpu_ms,
    descendants,
    proportional_bytes,
    resident_bytes,
)
from mesh.runtimes.isolated_protocol import PING_PATH, Pulse
from mesh.wire.client import Channel

_LOADING_S: Final = 0.025
_BUSY_S: Final = 0.05
_IDLE_S: Final = 2.0
# Children are looked for at every such look: that takes longer.
_CHILDREN_EVERY: Final = 4
# When the watch itself comes so late, the pod was held up: nobody is blamed for that time.
_LATE_S: Final = 1.0


class Watch:
    """From now on until the process ends. ``control`` is a channel of its own, so that no traffic
    holds up a Ping."""

    def __init__(
        self,
        process: WorkerProcess,
        control: Channel,
        limits: IsolationLimits,
        in_flight: Callable[[], int],
    ) -> None:
        self._process = process
        self._control = control
        self._limits = limits
        self._in_flight = in_flight
        self._ping_every_s = limits.ping_every_ms / 1e3
        self._loop = asyncio.get_running_loop()
        self._memory_bytes = limits.worker_memory_bytes + process.base_bytes
        self._looks = 0
        self._loading = True
        self._in_doubt = False  # something may be inside: nobody has said since that nothing is
        self._unwanted_since_s = 0.0  # more of them than anybody waits for; 0.0: no
        self._asked_s = 0.0  # the Ping under way; 0.0: none
        self._cpu_ms = 0
        self._idle_cpu_since_s = 0.0
        self._next_ping_s = 0.0
        self._ping: asyncio.Task[None] | None = None
        self._due_s = 0.0
        self._slow = False
        self._timer: asyncio.TimerHandle | None = None
        process.ended.add_done_callback(lambda _: self.stop())
        self._schedule(_LOADING_S)

    def loaded(self) -> None:
        self._loading = False

    def hurry(self) -> None:
        """Requests have come: look often."""
        self._in_doubt = True
        if self._slow and self._timer is not None:
            self._timer.cancel()
            self._next_ping_s = monotonic() + self._ping_every_s
            self._schedule(_BUSY_S)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ping is not None:
            self._ping.cancel()

    def _schedule(self, pace_s: float) -> None:
        self._slow = pace_s >= _IDLE_S
        self._due_s = monotonic() + pace_s
        self._timer = self._loop.call_later(pace_s, self._look)

    def _look(self) -> None:
        if self._process.ended.done():
            return
        if self._takes_too_much():
            limit_bytes = self._limits.worker_memory_bytes
            self._process.kill(isolated_limits.too_much_memory(limit_bytes))
            return
        if self._loading:
            self._schedule(_LOADING_S)
            return
        now_s = monotonic()
        if now_s - self._due_s > _LATE_S and self._asked_s:
            self._asked_s = self._idle_cpu_since_s = now_s
        self._look_for_hangs(now_s)
        self._schedule(_BUSY_S if self._in_doubt else _IDLE_S)

    def _takes_too_much(self) -> bool:
        pid, limit_bytes = self._process.pid, self._memory_bytes
        own_bytes = resident_bytes(pid)
        self._looks += 1
        if own_bytes > limit_bytes or (self._looks % _CHILDREN_EVERY and not self._slow):
            return own_bytes > limit_bytes
        family = [pid, *descendants(pid)]
        if len(family) == 1 or own_bytes + sum(map(resident_bytes, family[1:])) <= limit_bytes:
            return False
        # What they share was counted several times.
        return sum(map(proportional_bytes, family)) > limit_bytes

    def _look_for_hangs(self, now_s: float) -> None:
        limits = self._limits
        if self._unwanted_since_s and self._over(
            now_s, self._unwanted_since_s, limits.abandoned_timeout_ms
        ):
            self._process.kill(isolated_limits.abandoned(limits.abandoned_timeout_ms))
        elif self._asked_s:
            self._look_at_silence(now_s)
        elif now_s >= self._next_ping_s and self._in_doubt:
            self._next_ping_s = now_s + self._ping_every_s
            self._asked_s = self._idle_cpu_since_s = now_s
            self._cpu_ms = cpu_ms(self._process.pid)
            self._ping = self._loop.create_task(self._ask())

    def _look_at_silence(self, now_s: float) -> None:
        """A loop that computes may take as long as an inference; one that does nothing hangs."""
        limits = self._limits
        used_ms = cpu_ms(self._process.pid)
        if used_ms != self._cpu_ms:
            self._cpu_ms, self._idle_cpu_since_s = used_ms, now_s
        if self._over(now_s, self._asked_s, limits.infer_timeout_ms):
            self._process.kill(isolated_limits.inference_took_too_long(limits.infer_timeout_ms))
        elif self._over(now_s, self._idle_cpu_since_s, limits.silence_timeout_ms):
            self._process.kill(isolated_limits.silent(limits.silence_timeout_ms))
        elif self._ping is None or self._ping.done():
            self._ping = self._loop.create_task(self._ask())

    @staticmethod
    def _over(now_s: float, since_s: float, limit_ms: int) -> bool:
        return (now_s - since_s) * 1e3 > limit_ms

    async def _ask(self) -> None:
        try:
            pulse = Pulse.decode((await self._control.unary(PING_PATH, b"")).message)
        except MeshError:  # asked again; what cannot be reached at all is as silent
            return
        now_s = monotonic()
        self._asked_s = 0.0
        self._in_doubt = bool(pulse.running or self._in_flight())
        if pulse.running <= self._in_flight():
            self._unwanted_since_s = 0.0
        elif not self._unwanted_since_s:
            self._unwanted_since_s = now_s
        if pulse.oldest_ms > self._limits.infer_timeout_ms:
            limit_ms = self._limits.infer_timeout_ms
            self._process.kill(isolated_limits.inference_took_too_long(limit_ms))
