"""Decides when each child process of `mesh up` is started, restarted, stopped and killed.

Pure: no clock, no process, no socket. The shell (``mesh.up.supervisor``) reports events with the
time at which they happened and carries out the instructions that come back, in their order. An
event that makes no sense in a child's present phase is ignored where it can be late in real life
(an exit that crosses a stop) and raises ``ValueError`` where it would be a defect of the shell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import assert_never


class Phase(Enum):
    """Where one child stands."""

    WAITING = "waiting"  # an earlier stage is not ready yet; leaves to STARTING
    STARTING = "starting"  # runs, not ready yet; leaves to READY, BACKOFF or STOPPED
    READY = "ready"  # answered its readiness check; leaves to BACKOFF, STOPPING or STOPPED
    BACKOFF = "backoff"  # died; waits for its restart; leaves to STARTING or STOPPED
    STOPPING = "stopping"  # was asked to leave; leaves to STOPPED
    STOPPED = "stopped"  # gone for good


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One child and its place in the order.

    Children of ``start_stage`` n are started when all of the stages before are ready. Children of
    ``stop_stage`` n are asked to stop when all of the stages before have stopped.
    """

    name: str
    start_stage: int
    stop_stage: int


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The thresholds of restarting and stopping."""

    # The first restart comes at once for a person's eye, and not so fast that a loop burns a core.
    first_delay_ms: int = 250
    factor: int = 2
    max_delay_ms: int = 30_000
    # Deaths of one child before the mesh was complete for the first time, after which waiting any
    # longer helps nobody: about eight seconds of tries. Once complete, there is no such bound.
    first_deaths_max: int = 6
    # Ready for so long: the earlier deaths are forgotten.
    stable_after_ms: int = 60_000
    # What a child may take to drain before it is killed: more than it allows itself (20.5 s).
    stop_grace_ms: int = 25_000
    # Exit status by which a child says that its settings are wrong: a restart cannot mend that.
    usage_exit_status: int = 2


@dataclass(frozen=True, slots=True)
class Begin:
    """The supervisor is set up."""


@dataclass(frozen=True, slots=True)
class BecameReady:
    name: str


@dataclass(frozen=True, slots=True)
class Exited:
    """``status`` as Popen's returncode: negative for a signal; None when it could not start."""

    name: str
    status: int | None


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The first Ctrl-C or SIGTERM."""


@dataclass(frozen=True, slots=True)
class KillAsked:
    """The second Ctrl-C: no more patience."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; ``next_due_ms`` said until when."""


Event = Begin | BecameReady | Exited | StopAsked | KillAsked | Tick


@dataclass(frozen=True, slots=True)
class Start:
    name: str
    attempt: int  # 0 for the first


@dataclass(frozen=True, slots=True)
class Terminate:
    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class WillRestart:
    """To be told to the person: ``name`` died and comes back after ``delay_ms``."""

    name: str
    status: int | None
    delay_ms: int


@dataclass(frozen=True, slots=True)
class GaveUp:
    """To be told to the person: ``name`` will not run, so everything stops."""

    name: str
    status: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class AllReady:
    """Every child is ready. ``again`` when that was already said once."""

    again: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything has stopped. ``failed`` when it was not a person who asked for it."""

    failed: bool


Instruction = Start | Terminate | Kill | WillRestart | GaveUp | AllReady | Finished


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    phase: Phase = Phase.WAITING
    deaths: int = 0  # since it was last stable
    attempt: int = 0
    ready_at_ms: int = 0
    due_ms: int | None = None  # restart in BACKOFF, kill in STOPPING


class Supervision:
    """The state of all children. One mutator: ``handle``."""

    def __init__(self, specs: Iterable[ChildSpec], policy: RestartPolicy | None = None) -> None:
        self._children = {spec.name: _Child(spec) for spec in specs}
        self._policy = policy or RestartPolicy()
        self._stopping = False
        self._failed = False
        self._was_ready = False
        self._finished = False

    def phase(self, name: str) -> Phase:
        return self._children[name].phase

    @property
    def stopping(self) -> bool:
        return self._stopping

    def next_due_ms(self) -> int | None:
        """When the next ``Tick`` is wanted; None when only events can change anything."""
        dues = [child.due_ms for child in self._children.values() if child.due_ms is not None]
        return min(dues, default=None)

    def handle(self, event: Event, now_ms: int) -> list[Instruction]:
        match event:
            case Begin():
                return self._start_waiting()
            case BecameReady(name):
                return self._on_ready(self._children[name], now_ms)
            case Exited(name, status):
                return self._on_exit(self._children[name], status, now_ms)
            case StopAsked():
                return self._stop(now_ms)
            case KillAsked():
                return self._kill_all(now_ms)
            case Tick():
                return self._on_tick(now_ms)
        assert_never(event)

    def _start_waiting(self) -> list[Instruction]:
        """Start the first stage that waits, when all before it are ready."""
        waiting = [c for c in self._children.values() if c.phase is Phase.WAITING]
        if self._stopping or not waiting:
            return []
        stage = min(child.spec.start_stage for child in waiting)
        before = [c for c in self._children.values() if c.spec.start_stage < stage]
        if any(child.phase is not Phase.READY for child in before):
            return []
        return [self._start(c) for c in waiting if c.spec.start_stage == stage]

    def _start(self, child: _Child) -> Start:
        child.phase, child.due_ms = Phase.STARTING, None
        attempt, child.attempt = child.attempt, child.attempt + 1
        return Start(child.spec.name, attempt)

    def _on_ready(self, child: _Child, now_ms: int) -> list[Instruction]:
        if child.phase is not Phase.STARTING:
            return []  # the answer crossed its death, or the order to stop
        child.phase, child.ready_at_ms = Phase.READY, now_ms
        out = self._start_waiting()
        if all(c.phase is Phase.READY for c in self._children.values()):
            out.append(AllReady(again=self._was_ready))
            self._was_ready = True
        return out

    def _on_exit(self, child: _Child, status: int | None, now_ms: int) -> list[Instruction]:
        match child.phase:
            case Phase.STOPPING:
                child.phase, child.due_ms = Phase.STOPPED, None
                return self._stop_next(now_ms)
            case Phase.STARTING | Phase.READY:
                if self._stopping:  # died before its turn to stop came
                    child.phase = Phase.STOPPED
                    return self._stop_next(now_ms)
                return self._on_death(child, status, now_ms)
            case Phase.WAITING | Phase.BACKOFF | Phase.STOPPED:
                raise ValueError(f"{child.spec.name} does not run: it is {child.phase.value}")
        assert_never(child.phase)

    def _on_death(self, child: _Child, status: int | None, now_ms: int) -> list[Instruction]:
        policy = self._policy
        if status == policy.usage_exit_status:
            return self._give_up(child, status, "its settings are wrong", now_ms)
        ready = child.phase is Phase.READY
        if ready and now_ms - child.ready_at_ms >= policy.stable_after_ms:
            child.deaths = 0
        delay_ms = restart_delay_ms(child.deaths, policy)
        child.deaths += 1
        if not self._was_ready and child.deaths >= policy.first_deaths_max:
            reason = f"it died {child.deaths} times before the mesh was complete"
            return self._give_up(child, status, reason, now_ms)
        child.phase, child.due_ms = Phase.BACKOFF, now_ms + delay_ms
        return [WillRestart(child.spec.name, status, delay_ms)]

    def _give_up(
        self, child: _Child, status: int | None, reason: str, now_ms: int
    ) -> list[Instruction]:
        child.phase, self._failed = Phase.STOPPED, True
        return [GaveUp(child.spec.name, status, reason), *self._stop(now_ms)]

    def _stop(self, now_ms: int) -> list[Instruction]:
        if self._stopping:
            return []
        self._stopping = True
        for child in self._children.values():
            if child.phase in (Phase.WAITING, Phase.BACKOFF):
                child.phase, child.due_ms = Phase.STOPPED, None
        return self._stop_next(now_ms)

    def _stop_next(self, now_ms: int) -> list[Instruction]:
        alive = [c for c in self._children.values() if c.phase is not Phase.STOPPED]
        if not alive:
            if self._finished:
                return []
            self._finished = True
            return [Finished(self._failed)]
        stage = min(child.spec.stop_stage for child in alive)
        out: list[Instruction] = []
        for child in alive:
            if child.spec.stop_stage == stage and child.phase is not Phase.STOPPING:
                child.phase = Phase.STOPPING
                child.due_ms = now_ms + self._policy.stop_grace_ms
                out.append(Terminate(child.spec.name))
        return out

    def _kill_all(self, now_ms: int) -> list[Instruction]:
        out = self._stop(now_ms)
        # Those that have just been asked politely are killed in the same breath.
        out = [step for step in out if not isinstance(step, Terminate)]
        for child in self._children.values():
            if child.phase in (Phase.STARTING, Phase.READY, Phase.STOPPING):
                child.phase, child.due_ms = Phase.STOPPING, None
                out.append(Kill(child.spec.name, "asked for twice"))
        return out

    def _on_tick(self, now_ms: int) -> list[Instruction]:
        out: list[Instruction] = []
        for child in self._children.values():
            if child.due_ms is None or child.due_ms > now_ms:
                continue
            child.due_ms = None
            if child.phase is Phase.BACKOFF:
                out.append(self._start(child))
            elif child.phase is Phase.STOPPING:
                grace_s = self._policy.stop_grace_ms / 1000
                out.append(Kill(child.spec.name, f"did not stop within {grace_s:g} s"))
        return out


def restart_delay_ms(deaths: int, policy: RestartPolicy) -> int:
    """The wait before a restart after ``deaths`` earlier deaths: exponential, bounded."""
    # The exponent is bounded too: 2**deaths of a child that dies for days is a huge integer.
    growth: int = policy.factor ** min(deaths, 32)
    return min(policy.max_delay_ms, policy.first_delay_ms * growth)
