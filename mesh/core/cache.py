"""The cache of a serving pod: which copies are in memory, and what has to go to make room.

One mutator, ``Cache.handle(event, now_ms)``, returns instructions; the pod carries them out and
reports back with the next events. The table of a copy's life is in cache_table.py; a pair of state
and trigger that it does not hold raises ``IllegalTransition``, which is a defect of the caller.
Who may leave memory, and who first, is decided in cache_room.py and by the eviction order.

Rules:

* Bytes are reserved before a load starts and counted until ``UnloadFinished``: ``used_bytes`` is
  never below what the runtimes were given, and what it grants never passes the capacity. Only a
  measured size above its prediction can make ``used_bytes``, and so what is advertised, larger: it
  is a fact by then. That surplus, ``overrun_bytes``, is of loads that ran at once, no more than
  there are slots but for abandoned ones, and nothing new is granted until it is gone. The copy
  stays SIZING, serving nobody, until enough others have gone, and goes itself when they cannot or
  after ``memory_wait_ms``: it passes the capacity so long, and a Tick and an unload, at most
  (without ``memory_wait_ms``: its time-out). LOADED copies alone never do.
* A copy in UNLOADING takes no new requests; its unload starts when those inside have ended.
* By priority, for slots and for memory: AWAITED first, COPY behind, PROACTIVE last. Where there are
  several slots one is for awaited loads alone. Awaited loads evict; COPY evicts only what is worth
  less than what it brings and never waits for busy memory; PROACTIVE never evicts, not even into
  the unload buffer.
* The unload buffer is a share of the capacity that admissions keep free by evicting ahead, so that
  most loads need not wait for an unload.
* Memory goes to waiting loads in the order in which they came: a large one is not starved; one
  that pinned copies leave no room for any more is rejected, so that nobody waits behind it. An
  awaited load whose memory is all in use waits for it, at most ``memory_wait_ms``: requests end,
  and one that is rejected at once comes back and back. So when more models are asked for than fit,
  each copy serves those who waited for it, then makes room for the next. When no copy rests for a
  quarter of that time, the first in order takes no more requests, ends those inside, and goes;
  so too for an awaited copy that is SIZING.
* A copy unused for its idle time-out goes at the next ``Tick``, unless it is pinned or kept.

Not for use from several threads; fetches no time and no chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from mesh.core.cache_answers import outgrown, rejection, too_large, too_slow
from mesh.core.cache_events import (
    AbandonLoad,
    CopyEvent,
    Drain,
    Event,
    Instruction,
    LoadBroken,
    LoadEnded,
    LoadFinished,
    LoadWanted,
    Publish,
    Reason,
    SizePredicted,
    StartFetch,
    StartLoad,
    StartUnload,
    TermsChanged,
    Tick,
    UnloadWanted,
)
from mesh.core.cache_line import Line
from mesh.core.cache_room import Room
from mesh.core.cache_table import (
    FAILED,
    HOLDS_SLOT,
    LOADED,
    LOADING,
    QUEUED,
    RANK,
    REMOVED,
    SIZING,
    TRANSITIONS,
    TRIGGER_OF,
    UNLOADING,
    WAITING,
    CacheConfig,
    Copy,
    IllegalTransition,
    T,
    Trigger,
)
from mesh.core.errors import MeshError, NotFound
from mesh.core.types import CopyState


class Cache:
    """See the module's docstring. ``repr(cache)`` is a log line."""

    def __init__(self, config: CacheConfig) -> None:
        if config.capacity_bytes < 1 or config.load_slots < 1:
            raise ValueError(f"a cache needs capacity and at least one load slot: {config}")
        self.used_bytes = 0
        self.draining = False
        # Whether the pod has to tell BecameIdle: something waits for requests to end.
        self.awaiting_idle = False
        self._copies: dict[str, Copy] = {}
        self._active: dict[str, Copy] = {}  # all but LOADED: what _settle has to look at
        self._room = Room(config, self._copies)
        self._line = Line(self._active)
        self._sequence = 0
        self._now_ms = 0  # of the event being handled
        self._out: list[Instruction] = []

    def __repr__(self) -> str:
        return (
            f"Cache({self.used_bytes}/{self.config.capacity_bytes} B, {len(self._copies)} copies, "
            f"{len(self._active)} not loaded)"
        )

    # ---- reading ----

    def get(self, model_id: str) -> Copy | None:
        return self._copies.get(model_id)

    def copies(self) -> list[Copy]:
        return list(self._copies.values())

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def config(self) -> CacheConfig:
        return self._room.config

    def use_config(self, config: CacheConfig) -> None:
        """From the next event on. The capacity is what the pod was given: it cannot change."""
        if config.capacity_bytes != self.config.capacity_bytes or config.load_slots < 1:
            raise ValueError(f"a live cache keeps its capacity and a load slot: {config}")
        self._room.use_config(config, self._now_ms)

    @property
    def free_bytes(self) -> int:
        return self.config.capacity_bytes - self.used_bytes

    @property
    def loading_count(self) -> int:
        """Loads queued or under way."""
        return self._line.loading_count()

    def oldest_use_at_ms(self) -> int:
        return self._room.oldest_use_at_ms()

    def victim_score(self, now_ms: int) -> float:
        """Worth of the copy that would go first, for ``InstanceRecord``; 0.0 when none may."""
        return self._room.victim_score(now_ms)

    # ---- the one mutator ----

    def handle(self, event: Event, now_ms: int) -> tuple[Instruction, ...]:
        self._out, self._now_ms = [], now_ms
        match event:
            case Tick():
                self._tick(now_ms)
            case Drain():
                self.draining = True
                for copy in list(self._copies.values()):
                    self._step(copy, T.DRAINED, None, now_ms)
            case _:
                self._handle_copy(event, now_ms)
        self._settle(now_ms)
        out, self._out = tuple(self._out), []
        return out

    def _tick(self, now_ms: int) -> None:
        wait_ms = self.config.memory_wait_ms
        for copy in list(self._active.values()):
            starved = copy.starved(now_ms, wait_ms)
            if copy.state is SIZING and starved:
                self._step(copy, T.NO_MEMORY, None, now_ms)
            elif copy.state is not UNLOADING and (starved or copy.deadline_at_ms <= now_ms):
                self._step(copy, T.TIMED_OUT, None, now_ms)
        for copy in self._room.rested(now_ms):
            self._step(copy, T.RESTED, None, now_ms)

    def _handle_copy(self, event: CopyEvent, now_ms: int) -> None:
        copy = self._copies.get(event.model_id)
        if copy is not None:
            self._step(copy, TRIGGER_OF[type(event)], event, now_ms)
        elif isinstance(event, LoadWanted):
            self._admit(event, now_ms)
        elif not isinstance(event, UnloadWanted | TermsChanged):
            raise IllegalTransition(f"{event} for a model that is not here")

    def _step(self, copy: Copy, trigger: Trigger, event: CopyEvent | None, now_ms: int) -> None:
        allowed = TRANSITIONS.get((copy.state, trigger))
        if allowed is None:
            raise IllegalTransition(f"{trigger.value} in {copy.state.value}: {copy}")
        before = copy.state
        _ACTIONS[trigger](self, copy, event, now_ms)
        if copy.state not in allowed:
            raise IllegalTransition(f"{before.value} by {trigger.value} became {copy}")

    # ---- triggers ----

    def _admit(self, event: LoadWanted, now_ms: int) -> None:
        capacity, need = self.config.capacity_bytes, event.size_bytes
        reason: Reason | None = None
        if self.draining:
            reason = Reason.DRAINING
        elif need > capacity:
            reason = Reason.TOO_LARGE
            error = too_large(event.model_id, need, capacity)
            self._out.append(LoadEnded(event.model_id, reason, need, error))
        elif need > self._obtainable_bytes():
            reason = Reason.NO_ROOM
        if reason is not None:
            if reason is not Reason.TOO_LARGE:
                self._out.append(rejection(event.model_id, need, reason))
            self._out.append(Publish(event.model_id, REMOVED, 0, reason))
            return
        self._sequence += 1
        default = min(self.config.default_size_bytes, capacity)
        copy = Copy(event, self._sequence, default, now_ms)
        self._copies[copy.model_id] = self._active[copy.model_id] = copy
        self._room.terms(copy)

    def _load_wanted(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        assert isinstance(event, LoadWanted)
        if copy.state is UNLOADING:
            self._out.append(rejection(copy.model_id, 0, Reason.STILL_UNLOADING))
            return
        copy.pinned = copy.pinned or event.pinned
        copy.kept = copy.kept or event.kept
        copy.use_score = max(copy.use_score, event.use_score)
        self._room.terms(copy)
        copy.use.last_used_at_ms = max(copy.use.last_used_at_ms, event.last_used_at_ms)
        if copy.state is LOADED:
            self._out.append(LoadEnded(copy.model_id, Reason.ALREADY_LOADED, copy.size_bytes))
        elif RANK[event.priority] < RANK[copy.priority]:
            copy.priority = event.priority
            copy.deadline_at_ms = max(copy.deadline_at_ms, now_ms + event.timeout_ms)

    def _slot_granted(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        self._reserve_or_wait(copy, copy.need_bytes, now_ms, Reason.SLOT_FREE)

    def _size_predicted(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        assert isinstance(event, SizePredicted)
        copy.fetched = True
        copy.need_bytes = event.size_bytes
        if event.size_bytes > self.config.capacity_bytes:
            error = too_large(copy.model_id, event.size_bytes, self.config.capacity_bytes)
            self._fail(copy, Reason.TOO_LARGE, error)
            return
        self._account(copy, 0)  # nothing is in memory yet: waiting with it in hand could deadlock
        self._reserve_or_wait(copy, event.size_bytes, now_ms, Reason.SIZE_PREDICTED)

    def _reserve_or_wait(self, copy: Copy, need: int, now_ms: int, reason: Reason) -> None:
        limit = self.config.capacity_bytes
        if copy.proactive:
            limit -= self.config.unload_buffer_bytes
        if self._line.is_first(copy) and self.used_bytes + need <= limit:
            self._account(copy, need)
            self._enter_loading(copy, reason)
        elif copy.proactive:
            self._reject(copy, Reason.NO_FREE_MEMORY)
        elif need > self._obtainable_bytes():
            self._reject(copy, Reason.NO_ROOM)
        elif self._room.would_churn(now_ms):
            self._reject(copy, Reason.CHURN)
        else:
            copy.state = WAITING
            copy.waiting_at_ms = now_ms

    def _memory_granted(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        if copy.state is WAITING:
            self._account(copy, copy.need_bytes)
            self._enter_loading(copy, Reason.MEMORY_FREED)
            return
        copy.state = LOADED
        copy.overrun_bytes = 0
        copy.loaded_at_ms = now_ms
        copy.use.last_used_at_ms = max(copy.use.last_used_at_ms, now_ms if copy.awaited else 0)
        del self._active[copy.model_id]
        self._room.loaded(copy, now_ms)
        self._out.append(LoadEnded(copy.model_id, Reason.LOADED, copy.size_bytes))
        self._out.append(Publish(copy.model_id, LOADED, copy.size_bytes, Reason.LOADED))

    def _enter_loading(self, copy: Copy, reason: Reason) -> None:
        copy.state = LOADING
        copy.loading_at_ms = copy.loading_at_ms or self._now_ms
        if copy.fetched:
            self._out.append(StartLoad(copy.model_id, copy.size_bytes, reason))
        else:
            self._out.append(StartFetch(copy.model_id, reason))

    def _load_finished(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        assert isinstance(event, LoadFinished)
        copy.overrun_bytes = max(0, event.size_bytes - copy.size_bytes)
        copy.load_ms = event.load_ms or now_ms - copy.loading_at_ms
        self._account(copy, event.size_bytes)
        if copy.state is LOADING:
            copy.state = SIZING
            copy.waiting_at_ms = now_ms
        elif copy.load_running:
            copy.load_running = False
            self._start_unload(copy, now_ms)
        else:
            raise IllegalTransition(f"a load of {copy} was not under way")

    def _load_broken(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        assert isinstance(event, LoadBroken)
        if copy.state is LOADING:
            self._fail(copy, Reason.LOAD_FAILED, event.error)
        elif copy.load_running:
            self._leave(copy, REMOVED)
        else:
            raise IllegalTransition(f"a load of {copy} was not under way")

    def _timed_out(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        if copy.state in (QUEUED, WAITING):
            self._reject(copy, Reason.MEMORY_TIMEOUT)
            return
        error = too_slow(copy.model_id)
        self._out.append(LoadEnded(copy.model_id, Reason.LOAD_TIMEOUT, copy.size_bytes, error))
        self._enter_unloading(copy, Reason.LOAD_TIMEOUT, now_ms)

    def _no_memory(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        if copy.state is WAITING:
            never = copy.need_bytes > self._room.unpinned_bytes()
            self._reject(copy, Reason.NO_ROOM if never else Reason.WORTH_LESS)
            return
        final = copy.size_bytes > self.config.capacity_bytes
        error = (
            too_large(copy.model_id, copy.size_bytes, self.config.capacity_bytes)
            if final
            else outgrown(copy.model_id, copy.size_bytes, copy.overrun_bytes)
        )
        reason = Reason.TOO_LARGE if final else Reason.MEASURED_TOO_LARGE
        self._out.append(LoadEnded(copy.model_id, reason, copy.size_bytes, error))
        self._enter_unloading(copy, reason, now_ms)

    def _evicted(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        self._enter_unloading(copy, Reason.EVICTED, now_ms)

    def _rested(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        self._enter_unloading(copy, Reason.IDLE, now_ms)

    def _unload_wanted(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        assert isinstance(event, UnloadWanted)
        if copy.state is not UNLOADING:
            self._stop(copy, event.reason, now_ms)

    def _drained(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        if copy.state not in (LOADED, UNLOADING):
            self._stop(copy, Reason.DRAINING, now_ms)

    def _stop(self, copy: Copy, reason: Reason, now_ms: int) -> None:
        """Let a copy go whatever it is doing."""
        if copy.state is not LOADED:
            if reason is Reason.DELETED:
                error = NotFound(f"model {copy.model_id!r} was deleted while it was being loaded")
                self._out.append(LoadEnded(copy.model_id, reason, 0, error))
            else:
                self._out.append(rejection(copy.model_id, copy.need_bytes, reason))
        if copy.state in (QUEUED, WAITING):
            self._leave(copy, REMOVED)
            self._out.append(Publish(copy.model_id, REMOVED, 0, reason))
        else:
            self._enter_unloading(copy, reason, now_ms)

    def _became_idle(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        if copy.state is UNLOADING:
            self._start_unload(copy, now_ms)

    def _unload_finished(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        if not copy.unload_started:
            raise IllegalTransition(f"an unload of {copy} was not under way")
        self._leave(copy, REMOVED)

    def _terms_changed(self, copy: Copy, event: CopyEvent | None, now_ms: int) -> None:
        assert isinstance(event, TermsChanged)
        copy.pinned, copy.kept = event.pinned, event.kept
        copy.idle_unload_ms = event.idle_unload_ms
        self._room.terms(copy)

    # ---- leaving ----

    def _enter_unloading(self, copy: Copy, reason: Reason, now_ms: int) -> None:
        was = copy.state
        copy.state, copy.reason = UNLOADING, reason
        self._room.leaving(copy.model_id)
        self._active[copy.model_id] = copy
        self._out.append(Publish(copy.model_id, REMOVED, 0, reason))
        if was is LOADING:
            copy.load_running = True
            self._out.append(AbandonLoad(copy.model_id, reason))
        else:
            self._start_unload(copy, now_ms)

    def _start_unload(self, copy: Copy, now_ms: int) -> None:
        if copy.use.in_flight or copy.unload_started or copy.load_running:
            return
        copy.unload_started = True
        idle_ms = max(0, now_ms - copy.use.last_used_at_ms) if copy.use.last_used_at_ms else 0
        second = ""
        if copy.reason is Reason.EVICTED:
            second = self._room.victim(now_ms) or ""
        assert copy.reason is not None
        self._out.append(StartUnload(copy.model_id, copy.reason, idle_ms, second))

    def _fail(self, copy: Copy, reason: Reason, error: MeshError) -> None:
        self._leave(copy, FAILED)
        self._out.append(LoadEnded(copy.model_id, reason, copy.need_bytes, error))
        self._out.append(Publish(copy.model_id, REMOVED, 0, reason))

    def _reject(self, copy: Copy, reason: Reason) -> None:
        self._leave(copy, REMOVED)
        self._out.append(rejection(copy.model_id, copy.need_bytes, reason))
        self._out.append(Publish(copy.model_id, REMOVED, 0, reason))

    def _leave(self, copy: Copy, state: CopyState) -> None:
        self._account(copy, 0)
        copy.state = state
        copy.overrun_bytes = 0
        del self._copies[copy.model_id]
        self._active.pop(copy.model_id, None)
        self._room.left(copy.model_id)

    # ---- memory ----

    def _account(self, copy: Copy, size_bytes: int) -> None:
        self.used_bytes += size_bytes - copy.size_bytes
        copy.size_bytes = size_bytes

    def _settle(self, now_ms: int) -> None:
        """Hand out what is free, in order, then evict for who still waits."""
        if not self._active:
            self.awaiting_idle = False
            return
        self._settle_measured(now_ms)
        while True:
            self._grant_memory(now_ms)
            self._grant_slots(now_ms)
            if not self._make_room(now_ms):
                return

    def _grant_memory(self, now_ms: int) -> None:
        most = self._room.unpinned_bytes()
        for copy in self._line.waiting():
            if copy.need_bytes > most:  # a copy was pinned since: those behind need not wait, too
                self._step(copy, T.NO_MEMORY, None, now_ms)
            elif self.used_bytes + copy.need_bytes > self.config.capacity_bytes:
                return
            else:
                self._step(copy, T.MEMORY_GRANTED, None, now_ms)

    def _settle_measured(self, now_ms: int) -> None:
        sizing = self._line.sizing()
        for copy in sizing:
            if not copy.overrun_bytes or self.used_bytes <= self.config.capacity_bytes:
                self._step(copy, T.MEMORY_GRANTED, None, now_ms)
            elif copy.proactive:  # nobody is evicted for that
                self._step(copy, T.NO_MEMORY, None, now_ms)
        # Those left exceed their predictions. When even all that may go cannot make room, the
        # youngest of them goes itself; else they would wait for each other.
        left = [copy for copy in sizing if copy.state is SIZING]
        while left and sum(copy.size_bytes for copy in left) > self._obtainable_bytes():
            self._step(left.pop(), T.NO_MEMORY, None, now_ms)

    def _grant_slots(self, now_ms: int) -> None:
        queued = self._line.queued()
        if not queued:
            return
        slots, busy = self.config.load_slots, self._line.slots_held()
        for copy in queued:
            if busy >= (slots if copy.awaited else max(1, slots - 1)):
                return
            self._step(copy, T.SLOT_GRANTED, None, now_ms)
            busy += copy.state in HOLDS_SLOT

    def _make_room(self, now_ms: int) -> bool:
        """Evict for what waits, and ahead for the unload buffer while awaited loads go on. Whether
        a load was refused, as worth less than what would have to go: others come up then."""
        demand = self._line.demand(self.used_bytes - self.config.capacity_bytes)
        buffer = self.config.unload_buffer_bytes if demand.awaited else 0
        idle_wanted = demand.unloads_wait
        short = self._evict(demand.wanted_bytes + buffer, now_ms)
        if short > buffer and self._out_of_patience(now_ms):
            short = self._evict(short, now_ms, busy_too=True)
            idle_wanted = True
        wanted, refused = short - buffer, False
        for copy, bytes_ in demand.claims:
            wanted = self._evict(wanted + bytes_, now_ms, copy)
            if wanted > 0:
                wanted, refused = wanted - bytes_, True
                self._step(copy, T.NO_MEMORY, None, now_ms)
        self.awaiting_idle = idle_wanted or (short > 0 and self._line.wants_memory())
        return refused

    def _out_of_patience(self, now_ms: int) -> bool:
        wanting = (*self._line.waiting(), *self._line.sizing())
        return any(self._room.out_of_patience(copy, now_ms) for copy in wanting)

    def _evict(
        self, wanted_bytes: int, now_ms: int, load: Copy | None = None, *, busy_too: bool = False
    ) -> int:
        """Returns what is still wanting; below zero when there is more than was wanted."""
        while wanted_bytes > 0:
            victim = self._room.victim(now_ms, load, busy_too=busy_too)
            if victim is None:
                break
            wanted_bytes -= self._copies[victim].size_bytes
            self._step(self._copies[victim], T.EVICTED, None, now_ms)
        return wanted_bytes

    def _obtainable_bytes(self) -> int:
        return self._room.obtainable_bytes(self._active.values())


Action = Callable[[Cache, Copy, CopyEvent | None, int], None]

_ACTIONS: Final[Mapping[Trigger, Action]] = {
    T.LOAD_WANTED: Cache._load_wanted,
    T.SLOT_GRANTED: Cache._slot_granted,
    T.MEMORY_GRANTED: Cache._memory_granted,
    T.SIZE_PREDICTED: Cache._size_predicted,
    T.LOAD_FINISHED: Cache._load_finished,
    T.LOAD_BROKEN: Cache._load_broken,
    T.TIMED_OUT: Cache._timed_out,
    T.NO_MEMORY: Cache._no_memory,
    T.EVICTED: Cache._evicted,
    T.UNLOAD_WANTED: Cache._unload_wanted,
    T.DRAINED: Cache._drained,
    T.BECAME_IDLE: Cache._became_idle,
    T.UNLOAD_FINISHED: Cache._unload_finished,
    T.TERMS_CHANGED: Cache._terms_changed,
    T.RESTED: Cache._rested,
}
