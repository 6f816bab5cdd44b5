"""The values of the cache: its bounds, one copy, and the table of a copy's life.

``TRANSITIONS`` holds every legal (state, trigger) pair with the states that it may end in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from mesh.core.cache_events import (
    BecameIdle,
    CopyEvent,
    LoadBroken,
    LoadFinished,
    LoadWanted,
    Reason,
    SizePredicted,
    TermsChanged,
    UnloadFinished,
    UnloadWanted,
)
from mesh.core.policy import Policy
from mesh.core.types import CopyState, LoadPriority
from mesh.core.usage import Use

QUEUED, WAITING, LOADING = CopyState.QUEUED, CopyState.WAITING, CopyState.LOADING
SIZING, LOADED, FAILED = CopyState.SIZING, CopyState.LOADED, CopyState.FAILED
UNLOADING, REMOVED = CopyState.UNLOADING, CopyState.REMOVED

# The lower rank goes first.
RANK: Final = {LoadPriority.AWAITED: 0, LoadPriority.COPY: 1, LoadPriority.PROACTIVE: 2}

HOLDS_SLOT: Final = frozenset({WAITING, LOADING, SIZING})


class Trigger(Enum):
    """What moves a copy: the events from outside, and the cache's own grants."""

    LOAD_WANTED = "load-wanted"
    SLOT_GRANTED = "slot-granted"
    MEMORY_GRANTED = "memory-granted"
    SIZE_PREDICTED = "size-predicted"
    LOAD_FINISHED = "load-finished"
    LOAD_BROKEN = "load-broken"
    TIMED_OUT = "timed-out"
    NO_MEMORY = "no-memory"
    EVICTED = "evicted"
    UNLOAD_WANTED = "unload-wanted"
    DRAINED = "drained"
    BECAME_IDLE = "became-idle"
    UNLOAD_FINISHED = "unload-finished"
    TERMS_CHANGED = "terms-changed"
    RESTED = "rested"


T = Trigger

# The life of a copy. A new copy starts in QUEUED by LOAD_WANTED; FAILED and REMOVED have left.
TRANSITIONS: Final[Mapping[tuple[CopyState, Trigger], frozenset[CopyState]]] = {
    (QUEUED, T.LOAD_WANTED): frozenset({QUEUED}),
    (QUEUED, T.SLOT_GRANTED): frozenset({WAITING, LOADING, REMOVED}),
    (QUEUED, T.TIMED_OUT): frozenset({REMOVED}),
    (QUEUED, T.UNLOAD_WANTED): frozenset({REMOVED}),
    (QUEUED, T.DRAINED): frozenset({REMOVED}),
    (QUEUED, T.TERMS_CHANGED): frozenset({QUEUED}),
    (WAITING, T.LOAD_WANTED): frozenset({WAITING}),
    (WAITING, T.MEMORY_GRANTED): frozenset({LOADING}),
    (WAITING, T.NO_MEMORY): frozenset({REMOVED}),
    (WAITING, T.TIMED_OUT): frozenset({REMOVED}),
    (WAITING, T.UNLOAD_WANTED): frozenset({REMOVED}),
    (WAITING, T.DRAINED): frozenset({REMOVED}),
    (WAITING, T.TERMS_CHANGED): frozenset({WAITING}),
    (LOADING, T.LOAD_WANTED): frozenset({LOADING}),
    (LOADING, T.SIZE_PREDICTED): frozenset({LOADING, WAITING, FAILED, REMOVED}),
    (LOADING, T.LOAD_FINISHED): frozenset({SIZING}),
    (LOADING, T.LOAD_BROKEN): frozenset({FAILED}),
    (LOADING, T.TIMED_OUT): frozenset({UNLOADING}),
    (LOADING, T.UNLOAD_WANTED): frozenset({UNLOADING}),
    (LOADING, T.DRAINED): frozenset({UNLOADING}),
    (LOADING, T.TERMS_CHANGED): frozenset({LOADING}),
    (SIZING, T.LOAD_WANTED): frozenset({SIZING}),
    (SIZING, T.MEMORY_GRANTED): frozenset({LOADED}),
    (SIZING, T.NO_MEMORY): frozenset({UNLOADING}),
    (SIZING, T.TIMED_OUT): frozenset({UNLOADING}),
    (SIZING, T.UNLOAD_WANTED): frozenset({UNLOADING}),
    (SIZING, T.DRAINED): frozenset({UNLOADING}),
    (SIZING, T.TERMS_CHANGED): frozenset({SIZING}),
    (LOADED, T.LOAD_WANTED): frozenset({LOADED}),
    (LOADED, T.EVICTED): frozenset({UNLOADING}),
    (LOADED, T.UNLOAD_WANTED): frozenset({UNLOADING}),
    (LOADED, T.DRAINED): frozenset({LOADED}),
    (LOADED, T.BECAME_IDLE): frozenset({LOADED}),
    (LOADED, T.TERMS_CHANGED): frozenset({LOADED}),
    (LOADED, T.RESTED): frozenset({UNLOADING}),
    (UNLOADING, T.LOAD_WANTED): frozenset({UNLOADING}),
    (UNLOADING, T.LOAD_FINISHED): frozenset({UNLOADING}),  # of an abandoned load
    (UNLOADING, T.LOAD_BROKEN): frozenset({REMOVED}),  # of an abandoned load
    (UNLOADING, T.UNLOAD_WANTED): frozenset({UNLOADING}),
    (UNLOADING, T.DRAINED): frozenset({UNLOADING}),
    (UNLOADING, T.BECAME_IDLE): frozenset({UNLOADING}),
    (UNLOADING, T.UNLOAD_FINISHED): frozenset({REMOVED}),
    (UNLOADING, T.TERMS_CHANGED): frozenset({UNLOADING}),
}


TRIGGER_OF: Final[Mapping[type[CopyEvent], Trigger]] = {
    LoadWanted: Trigger.LOAD_WANTED,
    SizePredicted: Trigger.SIZE_PREDICTED,
    LoadFinished: Trigger.LOAD_FINISHED,
    LoadBroken: Trigger.LOAD_BROKEN,
    UnloadWanted: Trigger.UNLOAD_WANTED,
    UnloadFinished: Trigger.UNLOAD_FINISHED,
    BecameIdle: Trigger.BECAME_IDLE,
    TermsChanged: Trigger.TERMS_CHANGED,
}


class IllegalTransition(Exception):
    """An event that cannot happen in this state: a defect of whoever sent it."""


class BrokenInvariant(Exception):
    """``Cache.validate`` found the books wrong: a defect of the cache."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Bounds of one tier of memory."""

    capacity_bytes: int
    load_slots: int
    unload_buffer_bytes: int
    default_size_bytes: int  # reserved for a model of which nothing is known
    min_churn_age_ms: int = 0  # younger copies are not evicted for a load; 0: no guard
    first_use_grace_ms: int = 0  # an awaited copy stays for so long to be used once; 0: no grace
    # A load waits at most so long for memory that is busy or being freed, then it goes elsewhere;
    # 0: until its own time-out.
    memory_wait_ms: int = 0
    kept_share_max: float = 0.5  # of the capacity, for copies that go after all others
    eviction_order: str = "lru"
    evicted_remembered_max: int = 16_384  # models
    use_half_life_ms: int = 3_600_000  # of the scores that come with loads

    @staticmethod
    def from_policy(policy: Policy, capacity_bytes: int) -> CacheConfig:
        return CacheConfig(
            capacity_bytes=capacity_bytes,
            load_slots=policy.load_slots,
            unload_buffer_bytes=policy.unload_buffer_bytes(capacity_bytes),
            default_size_bytes=policy.default_model_size_bytes,
            min_churn_age_ms=policy.min_churn_age_ms,
            first_use_grace_ms=policy.first_use_grace_ms,
            memory_wait_ms=policy.placement_wait_ms,
            kept_share_max=policy.min_copies_capacity_share,
            eviction_order=policy.eviction_order,
            evicted_remembered_max=policy.evicted_remembered_max,
            use_half_life_ms=policy.use_half_life_ms,
        )


class Copy:
    """One copy, as the cache keeps it. Read freely; only the cache writes (but for ``use``)."""

    __slots__ = (
        "deadline_at_ms",
        "fetched",
        "idle_unload_ms",
        "kept",
        "load_ms",
        "load_running",
        "loaded_at_ms",
        "loading_at_ms",
        "model_id",
        "need_bytes",
        "overrun_bytes",
        "pinned",
        "priority",
        "reason",
        "sequence",
        "size_bytes",
        "state",
        "unload_started",
        "use",
        "use_score",
        "waiting_at_ms",
    )

    def __init__(self, event: LoadWanted, sequence: int, default_bytes: int, now_ms: int) -> None:
        self.model_id = event.model_id
        self.state = QUEUED
        self.size_bytes = 0  # counted in used_bytes
        self.need_bytes = event.size_bytes or default_bytes  # what WAITING waits for
        self.overrun_bytes = 0  # measured above what was reserved, not yet made room for
        self.fetched = False
        self.priority = event.priority
        self.pinned = event.pinned
        self.kept = event.kept
        self.idle_unload_ms = event.idle_unload_ms
        self.use_score = event.use_score  # its past elsewhere
        self.sequence = sequence
        self.deadline_at_ms = now_ms + event.timeout_ms
        self.waiting_at_ms = 0  # since when it waits for memory, or SIZING for what it has too much
        self.loading_at_ms = 0
        self.loaded_at_ms = 0
        self.load_ms = 0  # what its load took: what its next miss would cost
        self.load_running = False  # abandoned, and the pod has not said yet how it ended
        self.unload_started = False
        self.reason: Reason | None = None  # why it is leaving
        self.use = Use(event.last_used_at_ms)

    @property
    def proactive(self) -> bool:
        return self.priority is LoadPriority.PROACTIVE

    @property
    def awaited(self) -> bool:
        return self.priority is LoadPriority.AWAITED

    def queue_order(self) -> tuple[int, int, int]:
        """By priority; awaited ones and copies in the order of arrival, proactive ones the most
        recently used first."""
        return (
            RANK[self.priority],
            -self.use.last_used_at_ms if self.proactive else 0,
            self.sequence,
        )

    def starved(self, now_ms: int, memory_wait_ms: int) -> bool:
        """It has waited for memory as long as it may."""
        waits = self.state in (WAITING, SIZING) and memory_wait_ms > 0
        return waits and now_ms - self.waiting_at_ms >= memory_wait_ms

    def awaits_first_use(self, now_ms: int, grace_ms: int) -> bool:
        """Loaded just now for requests that are on their way to it."""
        unused = self.use.last_used_at_ms <= self.loaded_at_ms
        return unused and not self.proactive and now_ms - self.loaded_at_ms < grace_ms

    def __repr__(self) -> str:
        return f"Copy({self.model_id} {self.state.value} {self.size_bytes} B {self.use})"
