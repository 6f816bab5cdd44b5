"""A serving pod in virtual time: ``mesh.instance.pod`` and ``membership`` around the real cache.

It feeds ``mesh.core.cache.Cache`` with events and carries out its instructions, with durations
instead of work. ``serving`` is what the request path looks up; it is empty while the instance
takes no requests (it has crashed, is stopped, or has drained), so that a hit costs one look-up.

All that happens inside goes through ``after`` and ``deliver``: nothing happens to the dead, and
what happens to the stopped waits until they go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, assert_never

from bench.sim.draining import Draining
from bench.sim.loading import Loading
from bench.sim.messages import Answer, Flight, Wish
from bench.sim.publishing import ClaimResult, Publishing
from bench.sim.scaler import SimScaler, SimServable
from bench.sim.store import LeaseGone
from bench.sim.telling import Telling
from bench.sim.world import World
from mesh.core.cache import Cache
from mesh.core.cache_events import (
    AbandonLoad,
    BecameIdle,
    Drain,
    Event,
    Instruction,
    LoadEnded,
    LoadWanted,
    Publish,
    Reason,
    RejectLoad,
    StartFetch,
    StartLoad,
    StartUnload,
    UnloadWanted,
)
from mesh.core.cache_table import CacheConfig, Copy
from mesh.core.errors import RETRYABLE, MeshError, Unavailable
from mesh.core.loads import failure_record
from mesh.core.placement import predict_size_bytes
from mesh.core.types import CopyRecord, CopyState, InstanceState, ModelRecord
from mesh.instance.answers import LoadAnswer, LoadOutcome
from mesh.instance.measured import differs
from mesh.instance.pod import UNLOAD_WAIT_S
from mesh.instance.use_book import UseBook

if TYPE_CHECKING:
    from bench.sim.neighbours import PeerCall

NO_COPIES: Final[dict[str, Copy]] = {}
# After a lost lease a claim is tried again so much later, once.
LEASE_WAIT_MS: Final = 20.0


class SimInstance:
    """One life: after a crash another instance with another id comes in its place."""

    def __init__(
        self, world: World, instance_id: str, capacity_bytes: int, zone: str, place: int
    ) -> None:
        self.world = world
        self.instance_id = instance_id
        self.zone = zone
        self.place = place
        self.cache = Cache(CacheConfig.from_policy(world.policy, capacity_bytes))
        self.alive = True
        self.stopped = False
        self.went_on_at = -1.0  # after the last stop
        self.state = InstanceState.READY
        self.refusing = False  # the end of a drain: requests are sent away
        self.serving: dict[str, Copy] = {}
        self.requests = 0
        self.loads = 0  # that came to an end well
        self.publishing = Publishing(self)
        self.loading = Loading(self)
        self.telling = Telling(self)
        self.flights: dict[str, Flight] = {}
        self.records: dict[str, ModelRecord] = {}
        self._copies: dict[str, Copy] = {}  # what ``serving`` is while it takes requests
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []  # while stopped
        self._failed: dict[str, tuple[int, LoadAnswer]] = {}
        self._gone: dict[str, list[Callable[[], None]]] = {}
        self.peer_calls: dict[PeerCall, None] = {}  # loads that other instances have asked for
        self._claimed_at_ms: dict[str, int] = {}
        self.servables: dict[str, SimServable] = {}  # what the scaler sees of the copies
        self.use_book = UseBook()
        self.serving = self._copies

    def start(self) -> None:
        self.publishing.renew()
        self.telling.advertise()
        self.telling.something_happened()
        if self.world.settings.scaling:
            SimScaler(self)

    # ---- time -------------------------------------------------------------------------------

    def after(self, delay_ms: float, what: Callable[..., None], *args: Any) -> None:
        self.world.engine.after(delay_ms, self.deliver, what, *args)

    def deliver(self, what: Callable[..., None], *args: Any) -> None:
        """What has come to pass for this instance, once it can tell."""
        if not self.alive:
            return
        if self.stopped:
            self._held.append((what, args))
        else:
            what(*args)

    # ---- faults -----------------------------------------------------------------------------

    def crash(self) -> None:
        self._lose_touch()
        self.alive = False
        self.lose_peer_calls()

    def lose_peer_calls(self) -> None:
        for call in tuple(self.peer_calls):
            call.end()

    def stop(self) -> None:
        """SIGSTOP: it keeps its connections and says nothing."""
        self._lose_touch()
        self.stopped = True
        policy = self.world.policy
        self.world.engine.after(policy.ping_after_ms + policy.ping_timeout_ms, self._pinged)

    def _pinged(self) -> None:
        if self.stopped:
            self.lose_peer_calls()

    def go_on(self) -> None:
        if not self.alive or not self.stopped:
            return
        self.stopped = False
        self.went_on_at = self.world.engine.time
        self.serving = NO_COPIES if self.refusing else self._copies
        lease = self.publishing.lease
        if lease is not None and not self.world.store.kept_alive(lease):
            self.publishing.renew(lease)
        held, self._held = self._held, []
        for what, args in held:
            self.deliver(what, *args)

    def _lose_touch(self) -> None:
        self.serving = NO_COPIES
        lease, policy = self.publishing.lease, self.world.policy
        if lease is not None:
            ttl_ms = policy.instance_lease_ttl_ms
            left_ms = ttl_ms * (1.0 - self.world.random.random() / 3)  # kept alive each third
            self.world.store.not_kept_alive(lease, left_ms, ttl_ms)

    # ---- drain ------------------------------------------------------------------------------

    def drain(self, timeout_ms: float) -> None:
        if not self.alive or self.state is InstanceState.DRAINING:
            return
        self.state = InstanceState.DRAINING
        self.apply(Drain())
        self.telling.advertise()
        Draining(self, timeout_ms)

    def refuse(self) -> None:
        """The end of a drain: routers have heard of it, and what comes now is sent away."""
        self.refusing = True
        self.serving = NO_COPIES
        self._leave_when_idle()

    def _leave_when_idle(self) -> None:
        if any(copy.use.in_flight for copy in self.cache.copies()):
            self.after(self.world.settings.service_ms, self._leave_when_idle)
            return
        self.publishing.flush_then(self._leave)

    def _leave(self, written: bool) -> None:
        """Its keys go at once, or with its lease when the store is away."""
        lease = self.publishing.lease
        self.crash()
        self.world.checks.died(self)
        for router in self.world.routers:
            router.died(self.instance_id)
        if lease is not None and written:
            self.world.store.revoke(lease)

    def has(self, model_id: str) -> bool:
        """Whether a LOADED copy is here."""
        return model_id in self._copies

    def use_of(self, model_id: str) -> tuple[int, float]:
        """Last use and score of a copy that is here."""
        copy = self.cache.get(model_id)
        if copy is None:
            return 0, 0.0
        score = self.use_book.score(copy, self.world.policy.use_half_life_ms)
        return copy.use.last_used_at_ms, score

    def load_elsewhere(
        self, record: ModelRecord, instance_id: str, size_bytes: int, told: Callable[[bool], None]
    ) -> None:
        """One more copy of a model that is here."""
        last_used_at_ms, use_score = self.use_of(record.model_id)
        self.world.neighbours.load_on(
            instance_id,
            record,
            size_bytes=size_bytes,
            last_used_at_ms=last_used_at_ms,
            use_score=use_score,
            pin=False,
            told=partial(self.deliver, told),
        )

    # ---- requests ---------------------------------------------------------------------------

    def request_ended(self, copy: Copy) -> None:
        """``mesh.instance.executor``: the last request inside may be what an unload waits for."""
        use = copy.use
        use.in_flight -= 1
        if not use.in_flight and self.alive and self.cache.awaiting_idle:
            self.deliver(self._idle, copy.model_id)

    def _idle(self, model_id: str) -> None:
        if self.cache.get(model_id) is not None:
            self.apply(BecameIdle(model_id))

    # ---- wishes -----------------------------------------------------------------------------

    def load(self, wish: Wish, answer: Answer) -> None:
        copy = self._copies.get(wish.model_id)
        if copy is not None:
            use = copy.use
            use.last_used_at_ms = max(use.last_used_at_ms, wish.last_used_at_ms)
            answer(self._loaded_answer(wish.model_id))
            return
        flight = self.flights.get(wish.model_id)
        if flight is None:
            flight = self.flights[wish.model_id] = Flight(wish)
            flight.answers.append(answer)
            self._begin(flight)
            return
        flight.answers.append(answer)
        joined = flight.wish.joined_by(wish)
        assert isinstance(joined, Wish)
        flight.wish = joined
        known = self.cache.get(wish.model_id)
        if flight.in_cache and known is not None and known.state is not CopyState.UNLOADING:
            self.apply(self._wanted(flight))

    def unload(self, model_id: str) -> None:
        if self.cache.get(model_id) is not None:
            self.apply(UnloadWanted(model_id, Reason.ASKED))

    def _begin(self, flight: Flight) -> None:
        wish = flight.wish
        remembered = self._failed.get(wish.model_id)
        if remembered is not None and wish.revision < remembered[0]:
            self._finish(flight, remembered[1])
            return
        if self.cache.draining:
            self._finish(flight, _rejected(wish.model_id, "this instance is draining"))
            return
        copy = self.cache.get(wish.model_id)
        if copy is None:
            self._claim(flight)
        elif copy.load_running:
            text = "an abandoned load of it has not ended"
            self._finish(flight, _rejected(wish.model_id, text))
        else:
            self._gone.setdefault(wish.model_id, []).append(partial(self._claim, flight))
            self.after(UNLOAD_WAIT_S * 1_000, self._waited_for_unload, flight)

    def _waited_for_unload(self, flight: Flight) -> None:
        if flight.record is None and self.flights.get(flight.wish.model_id) is flight:
            text = "an earlier copy has not been unloaded yet"
            self._finish(flight, _rejected(flight.wish.model_id, text))

    def _claim(self, flight: Flight, retried: bool = False) -> None:
        wish = flight.wish
        if self.flights.get(wish.model_id) is not flight:
            return
        record = CopyRecord(
            wish.model_id,
            self.instance_id,
            CopyState.LOADING,
            size_bytes=predict_size_bytes(wish.known, self.world.policy) if wish.known else 0,
            claimed_at_ms=self.world.engine.now_ms,
        )
        self.publishing.claim(
            record, wish.revision, lambda result: self._claimed(flight, record, result, retried)
        )

    def _without_claim(self, flight: Flight, claim: CopyRecord) -> None:
        """The store is away: by the record that came along."""
        self.publishing.put_copy(claim)
        self._begin_load(flight, flight.wish.known, claim)

    def _claimed(
        self, flight: Flight, claim: CopyRecord, result: ClaimResult, retried: bool
    ) -> None:
        model_id = claim.model_id
        if isinstance(result, LeaseGone) and not retried:
            # A new lease is on its way.
            self.after(LEASE_WAIT_MS, self._claim, flight, True)
            return
        if isinstance(result, Unavailable) and flight.wish.known is not None:
            self._without_claim(flight, claim)
            return
        if isinstance(result, MeshError):
            if result.code in RETRYABLE:
                answer = _rejected(model_id, result.message)
            else:
                answer = LoadAnswer(LoadOutcome.FAILED, result.message, result.code)
            self._finish(flight, answer)
            return
        revision, holder = result
        if holder is not None:
            self._finish(
                flight,
                LoadAnswer(
                    LoadOutcome.CLAIMED_ELSEWHERE,
                    f"model {model_id!r} was claimed elsewhere in the meantime",
                    claimed_instance_id=holder[0],
                    copy_revision=holder[1],
                ),
            )
            return
        flight.claim_revision = revision
        self._begin_load(flight, self.world.store.models.get(model_id), claim)

    def _begin_load(self, flight: Flight, record: ModelRecord | None, claim: CopyRecord) -> None:
        assert record is not None  # simulated models are not deleted
        flight.record = record
        self._claimed_at_ms[record.model_id] = claim.claimed_at_ms
        self.records[record.model_id] = record
        flight.in_cache = True
        self.world.checks.claimed(self, flight.wish)
        self.apply(self._wanted(flight))

    def _wanted(self, flight: Flight) -> LoadWanted:
        record, wish = flight.record, flight.wish
        assert record is not None
        return LoadWanted(
            model_id=wish.model_id,
            size_bytes=record.size_bytes_stated or record.size_bytes_measured or 0,
            timeout_ms=record.load_timeout_ms or self.world.policy.load_timeout_ms,
            last_used_at_ms=wish.last_used_at_ms,
            priority=wish.priority,
            pinned=wish.pin and record.pinned,
            kept=record.min_copies > 1,
            use_score=wish.use_score,
            idle_unload_ms=self._idle_ms(record),
        )

    def _idle_ms(self, record: ModelRecord) -> int:
        own = record.idle_unload_ms
        return self.world.policy.idle_unload_ms if own is None else own

    # ---- the cache --------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        cache = self.cache
        instructions = cache.handle(event, self.world.engine.now_ms)
        self.world.checks.handled(self, event)
        self.telling.something_happened()
        for instruction in instructions:
            self._carry_out(instruction)
        if self._gone:
            for model_id in [m for m in self._gone if cache.get(m) is None]:
                for told in self._gone.pop(model_id):
                    told()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case StartFetch(model_id):
                self._start_fetch(model_id)
            case StartLoad(model_id):
                self.loading.start_load(model_id)
            case AbandonLoad(model_id):
                self.loading.abandon(model_id)
            case StartUnload(model_id, reason):
                self._start_unload(model_id, reason)
            case Publish(model_id, CopyState.LOADED, size_bytes):
                self._publish_loaded(model_id, size_bytes)
            case Publish(model_id, _):
                self._withdraw(model_id)
            case RejectLoad(model_id, reason, message):
                self.world.stats.rejected[reason.value] += 1
                self._answer_after_flush(model_id, LoadAnswer(LoadOutcome.REJECTED, message))
            case LoadEnded(model_id, _, _, None):
                self._loaded(model_id)
            case LoadEnded(model_id, _, size_bytes, error):
                assert error is not None
                self._load_failed(model_id, size_bytes, error)
            case _:
                assert_never(instruction)

    def _start_fetch(self, model_id: str) -> None:
        flight = self.flights[model_id]
        self.world.checks.load_starts(self, flight)
        self.world.trace.note("load", model_id, self.instance_id, flight.wish.priority.value)
        self.loading.start_fetch(model_id)

    def _loaded(self, model_id: str) -> None:
        copy = self.cache.get(model_id)
        assert copy is not None
        if model_id not in self._copies:
            self._copies[model_id] = copy
            settings = self.world.settings
            most = self.world.policy.default_max_concurrency
            self.servables[model_id] = SimServable(copy, settings.service_ms, most)
            self.loads += 1
            self.world.stats.loads += 1
        self._failed.pop(model_id, None)
        self._end_flight(model_id, self._loaded_answer(model_id))

    def _loaded_answer(self, model_id: str) -> LoadAnswer:
        copy = self.cache.get(model_id)
        flight = self.flights.get(model_id)
        return LoadAnswer(
            LoadOutcome.LOADED,
            copy_revision=flight.claim_revision if flight else 0,
            size_bytes=copy.size_bytes if copy else 0,
        )

    def _publish_loaded(self, model_id: str, size_bytes: int) -> None:
        copy = self.cache.get(model_id)
        assert copy is not None
        self.publishing.put_copy(
            CopyRecord(
                model_id,
                self.instance_id,
                CopyState.LOADED,
                size_bytes=size_bytes,
                claimed_at_ms=self._claimed_at_ms.get(model_id, copy.loaded_at_ms),
                loaded_at_ms=copy.loaded_at_ms,
                pinned=copy.pinned,
            )
        )
        if differs(self.records[model_id], size_bytes):
            record = replace(self.records[model_id], size_bytes_measured=size_bytes)
            self.publishing.put(record)

    def _withdraw(self, model_id: str) -> None:
        self.publishing.remove_copy(model_id)
        self._claimed_at_ms.pop(model_id, None)
        self.servables.pop(model_id, None)
        copy = self._copies.pop(model_id, None)
        if copy is not None:
            self.use_book.leaves(copy, self.world.policy.use_half_life_ms)
        if self.cache.get(model_id) is None:
            self.records.pop(model_id, None)
            self.loading.forget(model_id)

    def _start_unload(self, model_id: str, reason: Reason) -> None:
        stats = self.world.stats
        stats.evictions += reason is Reason.EVICTED
        stats.unloads += 1
        self.world.trace.note("unload", model_id, self.instance_id, reason.value)
        self.records.pop(model_id, None)
        self.loading.start_unload(model_id)

    def _load_failed(self, model_id: str, size_bytes: int, error: MeshError) -> None:
        world = self.world
        world.stats.load_failures += 1
        record = failure_record(
            model_id,
            self.instance_id,
            error.code,
            error.message,
            now_ms=world.engine.now_ms,
            policy=world.policy,
        )
        self.publishing.put(record)
        answer = LoadAnswer(LoadOutcome.FAILED, error.message, error.code, size_bytes=size_bytes)
        self._answer_after_flush(model_id, answer, remember=True)

    def _answer_after_flush(
        self, model_id: str, answer: LoadAnswer, *, remember: bool = False
    ) -> None:
        """The claim goes before who waits is told."""

        def told(written: bool) -> None:
            if written and remember:
                self._failed[model_id] = (self.publishing.revision, answer)
            self._end_flight(model_id, answer)

        self.publishing.flush_then(told)

    def _end_flight(self, model_id: str, answer: LoadAnswer) -> None:
        flight = self.flights.get(model_id)
        if flight is not None and flight.in_cache:
            self._finish(flight, answer)

    def _finish(self, flight: Flight, answer: LoadAnswer) -> None:
        if self.flights.get(flight.wish.model_id) is flight:
            del self.flights[flight.wish.model_id]
        self.world.checks.answered(self, flight.wish)
        answers, flight.answers = flight.answers, []
        for told in answers:
            told(answer)


def _rejected(model_id: str, why: str) -> LoadAnswer:
    return LoadAnswer(LoadOutcome.REJECTED, f"model {model_id!r} is not loaded here: {why}")
