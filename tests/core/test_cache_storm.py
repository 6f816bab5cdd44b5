"""Any order of events keeps the books right; the pod answers late, wrongly sized, or with a fault.

The dumb model beside it only remembers what a pod physically holds: bytes that a StartLoad was
given and an UnloadFinished has not returned. They never pass the capacity but for what a load
measured above its prediction.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.core.cache_events import (
    AbandonLoad,
    BecameIdle,
    Drain,
    Event,
    Instruction,
    LoadBroken,
    LoadEnded,
    LoadFinished,
    LoadWanted,
    Publish,
    Reason,
    RejectLoad,
    SizePredicted,
    StartFetch,
    StartLoad,
    StartUnload,
    TermsChanged,
    Tick,
    UnloadFinished,
    UnloadWanted,
)
from mesh.core.cache_table import HOLDS_SLOT, Copy
from mesh.core.errors import Unavailable
from mesh.core.eviction import ORDERS
from mesh.core.types import CopyState, LoadPriority
from tests.core.cache_driver import Driver

CAPACITY = 100
NAMES = st.sampled_from([f"m{i}" for i in range(7)])


class Storm(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        self.fetching: set[str] = set()
        self.loading: dict[str, int] = {}  # reserved bytes
        self.held: dict[str, int] = {}  # measured bytes in the pod's memory
        self.surplus: dict[str, int] = {}
        self.unloading: set[str] = set()
        self.waiters: set[str] = set()
        self.published: set[str] = set()

    @initialize(
        slots=st.integers(1, 3),
        buffer=st.sampled_from([0, 5, 20]),
        order=st.sampled_from(sorted(ORDERS)),
        wait_ms=st.sampled_from([0, 400]),
        kept_share=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def start(self, slots: int, buffer: int, order: str, wait_ms: int, kept_share: float) -> None:
        self.driver = Driver(
            CAPACITY,
            slots,
            buffer,
            eviction_order=order,
            memory_wait_ms=wait_ms,
            kept_share_max=kept_share,
            evicted_remembered_max=3,
        )

    @rule(order=st.sampled_from(sorted(ORDERS)), slots=st.integers(1, 3))
    def live_policy(self, order: str, slots: int) -> None:
        config = self.driver.cache.config
        busy = sum(copy.state in HOLDS_SLOT for copy in self.driver.cache.copies())
        self.driver.cache.use_config(
            replace(config, eviction_order=order, load_slots=max(slots, busy))
        )
        self.send(Tick())

    def send(self, event: Event, after_ms: int = 1) -> None:
        before = {c.model_id: c for c in self.driver.cache.copies()}
        out = self.driver.send(event, after_ms)
        self.check_evictions(event, out, before)
        for instruction in out:
            match instruction:
                case StartFetch(model_id):
                    self.fetching.add(model_id)
                case StartLoad(model_id, reserved):
                    assert model_id not in self.held
                    self.loading[model_id] = reserved
                case AbandonLoad(model_id):
                    assert model_id in self.fetching or model_id in self.loading
                case StartUnload(model_id):
                    assert before[model_id].use.in_flight == 0
                    assert model_id in self.held
                    self.unloading.add(model_id)
                case Publish(model_id, state):
                    if state is CopyState.LOADED:
                        self.published.add(model_id)
                    else:
                        self.published.discard(model_id)
                case LoadEnded(model_id) | RejectLoad(model_id):
                    self.waiters.discard(model_id)

    def check_evictions(
        self, event: Event, out: tuple[Instruction, ...], before: dict[str, Copy]
    ) -> None:
        """Nobody is pushed out for a load ahead of requests; pinned copies stay, kept ones rest."""
        gone = [i for i in out if isinstance(i, Publish) and i.state is not CopyState.LOADED]
        evicted = [before[i.model_id] for i in gone if i.reason is Reason.EVICTED]
        assert not any(copy.pinned for copy in evicted)
        others = any(
            c.priority is not LoadPriority.PROACTIVE and c.state is not CopyState.UNLOADING
            for c in before.values()
            if c.state is not CopyState.LOADED
        )
        wanted = isinstance(event, LoadWanted) and event.priority is not LoadPriority.PROACTIVE
        assert not evicted or others or wanted
        for idle in (i for i in gone if i.reason is Reason.IDLE):
            copy = before[idle.model_id]
            assert not (copy.pinned or copy.kept) and isinstance(event, Tick)

    @rule(
        name=NAMES,
        size=st.sampled_from([0, 5, 30, 60, 101]),
        priority=st.sampled_from(LoadPriority),
        kept=st.booleans(),
        idle_ms=st.sampled_from([0, 0, 2_000]),
        score=st.sampled_from([0.0, 5.0]),
    )
    def want(
        self,
        name: str,
        size: int,
        priority: LoadPriority,
        kept: bool,
        idle_ms: int,
        score: float,
    ) -> None:
        self.waiters.add(name)
        used_at_ms = self.driver.now_ms - 50
        self.send(LoadWanted(name, size, 5_000, used_at_ms, priority, False, kept, score, idle_ms))

    @precondition(lambda self: self.fetching)
    @rule(data=st.data(), size=st.sampled_from([1, 10, 35, 70, 101]))
    def fetched(self, data: st.DataObject, size: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.fetching)))
        self.fetching.discard(name)
        if self.driver.state(name) is CopyState.UNLOADING:
            self.send(LoadBroken(name, Unavailable("abandoned")))
        else:
            self.send(SizePredicted(name, size))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), growth=st.sampled_from([-3, 0, 0, 10, 60]))
    def loaded(self, data: st.DataObject, growth: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.loading)))
        reserved = self.loading.pop(name)
        self.held[name] = max(1, reserved + growth)
        self.surplus[name] = max(0, self.held[name] - reserved)
        self.send(LoadFinished(name, self.held[name]))

    @precondition(lambda self: self.fetching or self.loading)
    @rule(data=st.data())
    def broken(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.fetching | set(self.loading))))
        self.fetching.discard(name)
        self.loading.pop(name, None)
        self.send(LoadBroken(name, Unavailable("broken")))

    @precondition(lambda self: self.unloading)
    @rule(data=st.data())
    def unloaded(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.unloading)))
        self.unloading.discard(name)
        del self.held[name]
        self.surplus.pop(name, None)
        self.send(UnloadFinished(name))

    @rule(name=NAMES, reason=st.sampled_from([Reason.ASKED, Reason.DELETED]))
    def unload(self, name: str, reason: Reason) -> None:
        self.send(UnloadWanted(name, reason))

    @rule(name=NAMES)
    def request_starts(self, name: str) -> None:
        if self.driver.state(name) is CopyState.LOADED:
            self.driver.use(name, +1)

    @rule(name=NAMES)
    def request_ends(self, name: str) -> None:
        copy = self.driver.cache.get(name)
        if copy is not None and copy.use.in_flight:
            copy.use.in_flight -= 1
            if not copy.use.in_flight and self.driver.cache.awaiting_idle:
                self.send(BecameIdle(name))

    @rule(name=NAMES, pinned=st.booleans(), kept=st.booleans(), idle_ms=st.sampled_from([0, 500]))
    def terms(self, name: str, pinned: bool, kept: bool, idle_ms: int) -> None:
        self.send(TermsChanged(name, pinned, kept, idle_ms))

    @rule(after_ms=st.sampled_from([1, 1_000, 6_000]))
    def tick(self, after_ms: int) -> None:
        self.send(Tick(), after_ms)

    @precondition(lambda self: self.driver.now_ms > 1_020_000)
    @rule()
    def drain(self) -> None:
        self.send(Drain())

    @invariant()
    def the_pod_never_holds_more_than_its_capacity(self) -> None:
        held = sum(self.loading.values()) + sum(self.held.values())
        over = sum(
            surplus
            for name, surplus in self.surplus.items()
            if self.driver.state(name) in (CopyState.SIZING, CopyState.UNLOADING)
        )
        assert held - over <= CAPACITY
        assert held <= self.driver.cache.used_bytes

    @invariant()
    def exactly_the_loaded_copies_are_published(self) -> None:
        assert self.published == self.driver.loaded()

    @invariant()
    def whoever_waits_waits_for_a_load_that_is_here(self) -> None:
        going = {
            c.model_id
            for c in self.driver.cache.copies()
            if c.state not in (CopyState.LOADED, CopyState.UNLOADING)
        }
        assert self.waiters == going

    def teardown(self) -> None:
        """Left alone, with the pod obeying, everything settles and can be emptied."""
        for copy in self.driver.cache.copies():
            while copy.use.in_flight:
                self.request_ends(copy.model_id)
        for _ in range(60):
            for name in sorted(self.fetching):
                self.fetching.discard(name)
                if self.driver.state(name) is CopyState.UNLOADING:
                    self.send(LoadBroken(name, Unavailable("abandoned")))
                else:
                    self.send(SizePredicted(name, 10))
            for name in sorted(self.loading):
                self.held[name] = self.loading.pop(name)
                self.send(LoadFinished(name, self.held[name]))
            for name in sorted(self.unloading):
                self.unloading.discard(name)
                del self.held[name]
                self.send(UnloadFinished(name))
        assert not self.waiters
        for copy in self.driver.cache.copies():
            self.send(UnloadWanted(copy.model_id, Reason.ASKED))
        for name in sorted(self.unloading):
            self.send(UnloadFinished(name))
        assert len(self.driver.cache) == 0
        assert self.driver.cache.used_bytes == 0


Storm.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestStorm = Storm.TestCase
