"""The copies of one serving pod: feeds the cache with events and carries out its instructions.

Owns the request path's table (``servables``), the records of what is here, and what is published of
it. Who waits is in ``mesh.instance.flights``, what goes before a load in ``claims``, what is told
of a failed one in ``failures``. Decides nothing about memory (``mesh.core.cache``) and touches no
file or runtime (``mesh.instance.loader``).

Everything runs in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final, assert_never

from mesh import registry
from mesh.artifacts import ArtifactSource
from mesh.core.batching import Wished
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
    TermsChanged,
    Tick,
    UnloadWanted,
)
from mesh.core.cache_table import CacheConfig, Copy
from mesh.core.demand import known_size_bytes
from mesh.core.errors import RETRYABLE, Code, MeshError, NotFound
from mesh.core.policy import Policy
from mesh.core.types import CopyRecord, CopyState, ModelRecord
from mesh.decision_log import DecisionLog
from mesh.instance import measured
from mesh.instance.answers import LoadAnswer, LoadOutcome
from mesh.instance.claims import Claims, Ready
from mesh.instance.clock import Clock
from mesh.instance.failures import Failures
from mesh.instance.flights import Flight, Flights, Wish
from mesh.instance.loader import Loader, Runtimes
from mesh.instance.neighbours import Neighbours
from mesh.instance.publisher import Publisher
from mesh.instance.servable import Servable
from mesh.instance.use_book import UseBook
from mesh.metrics import InstanceMetrics
from mesh.runtimes.api import AnyModel, VersionedModel, is_remote
from mesh.store.api import KVStore

log = logging.getLogger(__name__)

# A new Load for a model whose copy is still being unloaded waits so long for that.
UNLOAD_WAIT_S: Final = 30.0


class Pod:
    """See the module's docstring."""

    def __init__(
        self,
        instance_id: str,
        cache_config: CacheConfig,
        policy: Policy,
        store: KVStore,
        publisher: Publisher,
        source: ArtifactSource,
        runtimes: Runtimes,
        metrics: InstanceMetrics,
        clock: Clock,
        decisions: DecisionLog | None = None,
    ) -> None:
        self.instance_id = instance_id
        self.cache = Cache(cache_config)
        self.policy = policy
        self.decisions = decisions
        self.servables: dict[str, Servable] = {}
        self.records: dict[str, ModelRecord] = {}  # of the copies in the cache
        self.claimed_at_ms: dict[str, int] = {}  # of the same
        self.loader = Loader(source, runtimes, metrics, self.apply)
        self.claims = Claims(instance_id, store, publisher, clock)
        self.neighbours = Neighbours(instance_id, store, policy, clock, use_of=self._use_of)
        self._store = store
        self._publisher = publisher
        self._metrics = metrics
        self._clock = clock
        self._flights = Flights()
        self._failures = Failures(instance_id, publisher, clock)
        self._gone: dict[str, asyncio.Future[None]] = {}
        self._asked_because: dict[str, str] = {}  # copies that somebody has told to unload
        self._tasks: set[asyncio.Task[object]] = set()
        self.use_book = UseBook()

    def use_policy(self, policy: Policy, cache_config: CacheConfig) -> None:
        """From now on; what is loaded stays."""
        self.policy = policy
        self.cache.use_config(cache_config)
        self.neighbours.use_policy(policy)
        for record in list(self.records.values()):
            self.record_changed(record)

    # ---- wishes ----

    async def load(self, wish: Wish) -> LoadAnswer:
        """Returns when the load has ended, however it did."""
        model_id = wish.model_id
        servable = self.servables.get(model_id)
        if servable is not None:
            servable.use.last_used_at_ms = max(servable.use.last_used_at_ms, wish.last_used_at_ms)
            if wish.pin:
                self._pin(model_id)
            return self._loaded_answer(model_id)
        flight = self._flights.get(model_id)
        if flight is None:
            flight = self._flights.start(wish)
            self._spawn(self._begin(flight))
        else:
            flight.wish = flight.wish.joined_by(wish)
            copy = self.cache.get(model_id)
            if flight.in_cache and copy is not None and copy.state is not CopyState.UNLOADING:
                self.apply(self._wanted(flight))
        return await asyncio.shield(flight.answer)

    async def unload(self, model_id: str, because: str = "") -> bool:
        """Whether there was a copy; returns when it is gone."""
        if self.cache.get(model_id) is None:
            return False
        self._asked_because[model_id] = because
        self.apply(UnloadWanted(model_id, Reason.ASKED))
        if self.cache.get(model_id) is not None:
            await asyncio.shield(self._until_gone(model_id))
        return True

    def deleted(self, model_id: str) -> None:
        """The model is not registered any more: its requests finish, then it goes."""
        if self.cache.get(model_id) is not None:
            self.apply(UnloadWanted(model_id, Reason.DELETED))

    def concerning(self) -> set[str]:
        """Ids of the models of which it matters here what their records say."""
        return {copy.model_id for copy in self.cache.copies()}.union(self._flights.beginning())

    def concerns(self, model_id: str) -> bool:
        return self.cache.get(model_id) is not None or self._flights.get(model_id) is not None

    def told(self, model_id: str, record: ModelRecord | None, revision: int) -> None:
        """What a watch says of a model; None: it was deleted."""
        flight = self._flights.get(model_id)
        if flight is not None and not flight.in_cache:
            flight.told = (revision, record)
        if record is None:
            self.deleted(model_id)
        else:
            self.record_changed(record)

    def lost(self, model_id: str) -> None:
        """The runtime says that it has the model no more: nobody is to be sent here for it."""
        if model_id in self.servables:
            log.warning("the runtime has lost model %s", model_id)
            self.apply(UnloadWanted(model_id, Reason.LOST))

    def record_changed(self, record: ModelRecord) -> None:
        """Also for terms that the policy changed."""
        model_id = record.model_id
        copy = self.cache.get(model_id)
        if copy is None or copy.state is CopyState.UNLOADING:
            return
        self.records[model_id] = record
        servable = self.servables.get(model_id)
        if servable is not None:
            servable.use_concurrency(self._concurrency(record, self.loader.models[model_id]))
            servable.use_batching(_wished(record), self.policy)
        # Only a Load pins a copy: one copy of a pinned model is, and the leader says which.
        self._terms(record, pinned=copy.pinned and record.pinned)

    def _pin(self, model_id: str) -> None:
        record = self.records.get(model_id)
        if record is not None and record.pinned:
            self._terms(record, pinned=True)

    def _terms(self, record: ModelRecord, *, pinned: bool) -> None:
        copy = self.cache.get(record.model_id)
        assert copy is not None
        was_pinned, kept, idle_ms = copy.pinned, _kept(record), self._idle_ms(record)
        if (was_pinned, copy.kept, copy.idle_unload_ms) == (pinned, kept, idle_ms):
            return
        self.apply(TermsChanged(record.model_id, pinned, kept, idle_ms))
        if pinned != was_pinned:
            self._note("pin", "pinned" if pinned else "unpinned", record.model_id)
            if copy.state is CopyState.LOADED:
                self._publish_loaded(record.model_id, copy.size_bytes)

    def batching_changed(self, model_id: str, reason: str, detail: str) -> None:
        """Requests for a copy are joined from now on, or no more."""
        self._note("batch", reason, model_id, detail=detail)

    def became_idle(self, model_id: str) -> None:
        self.apply(BecameIdle(model_id))

    def idle_wanted(self) -> bool:
        return self.cache.awaiting_idle

    def tick(self) -> None:
        self.apply(Tick())

    def drain(self) -> None:
        self.apply(Drain())

    async def confirm(self) -> None:
        """The store is back: what it does not know any more goes."""
        async for model_id, record in self.claims.confirmed():
            if record is None:
                self.deleted(model_id)
            else:
                self.record_changed(record)

    async def close(self) -> None:
        """End the tasks of this pod; nothing is unloaded, the process ends."""
        tasks = [*self._tasks, *(job.task for job in self.loader.jobs.values() if job.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.neighbours.close()

    # ---- before the cache ----

    async def _begin(self, flight: Flight) -> None:
        model_id = flight.wish.model_id
        try:
            ready = await self._not_now(flight.wish) or await self.claims.claim(
                flight.wish, self.policy
            )
        except MeshError as error:
            if error.code in RETRYABLE:
                # The store's fault, not the model's: nothing is to be remembered against it.
                ready = _rejected(model_id, error.message)
            else:
                ready = LoadAnswer(LoadOutcome.FAILED, error.message, error.code)
        except Exception:
            log.exception("the load of model %r could not begin", model_id)
            why = "the load could not begin: a defect"
            ready = LoadAnswer(LoadOutcome.FAILED, why, Code.INTERNAL)
        if not isinstance(ready, Ready):
            self._flights.finish(flight, ready)
            return
        record = ready.record_after(flight.told)
        if record is None:
            self._publisher.remove_copy(model_id)
            why = f"model {model_id!r} was deleted when its load was about to begin"
            self._flights.finish(flight, LoadAnswer(LoadOutcome.FAILED, why, Code.NOT_FOUND))
            return
        flight.record, flight.claim_revision = record, ready.revision
        self.claimed_at_ms[model_id] = ready.claimed_at_ms
        self.records[model_id] = record
        self.loader.prepare(record)
        flight.in_cache = True
        self.apply(self._wanted(flight))

    async def _not_now(self, wish: Wish) -> LoadAnswer | None:
        """Why a load does not come to its claim."""
        model_id = wish.model_id
        known = self._failures.known(model_id, wish.revision)
        if known is not None:
            return known
        if self.cache.draining:
            return _rejected(model_id, "this instance is draining")
        copy = self.cache.get(model_id)
        if copy is not None:
            if copy.load_running:
                return _rejected(model_id, "an abandoned load of it has not ended")
            try:
                async with asyncio.timeout(UNLOAD_WAIT_S):
                    await asyncio.shield(self._until_gone(model_id))
            except TimeoutError:
                return _rejected(model_id, "an earlier copy has not been unloaded yet")
        return None

    def _wanted(self, flight: Flight) -> LoadWanted:
        record, wish = flight.record, flight.wish
        assert record is not None
        return LoadWanted(
            model_id=wish.model_id,
            size_bytes=known_size_bytes(record),
            timeout_ms=record.load_timeout_ms or self.policy.load_timeout_ms,
            last_used_at_ms=wish.last_used_at_ms,
            priority=wish.priority,
            pinned=wish.pin and record.pinned,
            kept=_kept(record),
            use_score=wish.use_score,
            idle_unload_ms=self._idle_ms(record),
        )

    # ---- the cache ----

    def apply(self, event: Event) -> None:
        """Feed the cache and carry out what it says. Instructions only start things, so this is
        never re-entered."""
        for instruction in self.cache.handle(event, self._clock.now_ms()):
            self._carry_out(instruction)
        if not isinstance(event, Tick | Drain) and self.cache.get(event.model_id) is None:
            self.records.pop(event.model_id, None)
            self._asked_because.pop(event.model_id, None)
        for model_id in [name for name in self._gone if self.cache.get(name) is None]:
            self._gone.pop(model_id).set_result(None)

    def _carry_out(self, instruction: Instruction) -> None:
        log.debug("%s", instruction)
        match instruction:
            case StartFetch(model_id):
                self.loader.start_fetch(model_id)
            case StartLoad(model_id):
                self.loader.start_load(model_id)
            case AbandonLoad(model_id):
                self.loader.abandon(model_id)
            case StartUnload():
                self._start_unload(instruction)
            case Publish(model_id, CopyState.LOADED, size_bytes):
                self._publish_loaded(model_id, size_bytes)
            case Publish(model_id, _):
                self._withdraw(model_id)
            case RejectLoad(model_id, reason, message):
                self._count(model_id, reason.value)
                self._note("reject", reason.value, model_id, detail=message)
                self._spawn(self._reject(model_id, LoadAnswer(LoadOutcome.REJECTED, message)))
            case LoadEnded(model_id, _, _, None):
                self._loaded(model_id)
            case LoadEnded():
                self._load_failed(instruction)
            case _:
                assert_never(instruction)

    def _loaded(self, model_id: str) -> None:
        copy = self.cache.get(model_id)
        assert copy is not None
        if model_id not in self.servables:
            record, model = self.records[model_id], self.loader.models[model_id]
            servable = self.servables[model_id] = Servable(
                model_id,
                record.model_type,
                model,
                copy.use,
                self._concurrency(record, model),
            )
            servable.use_batching(_wished(record), self.policy)
            self._count(model_id, "loaded")
            flight = self._flights.get(model_id)
            log.info(
                "loaded %s: %d bytes in %.1f ms (%s%s)",
                model_id,
                copy.size_bytes,
                self.loader.load_ms.get(model_id, 0.0),
                copy.priority.value,
                f", {flight.wish.reason}" if flight is not None and flight.wish.reason else "",
            )
        self._failures.forget(model_id)
        self._flights.end(model_id, self._loaded_answer(model_id))

    def _loaded_answer(self, model_id: str) -> LoadAnswer:
        copy = self.cache.get(model_id)
        flight = self._flights.get(model_id)
        return LoadAnswer(
            LoadOutcome.LOADED,
            copy_revision=flight.claim_revision if flight else 0,
            size_bytes=copy.size_bytes if copy else 0,
        )

    def _publish_loaded(self, model_id: str, size_bytes: int) -> None:
        """After the waiters' answers: the publisher writes a little later, in batches."""
        copy = self.cache.get(model_id)
        assert copy is not None
        record = self.records[model_id]
        self._publisher.put_copy(
            CopyRecord(
                model_id,
                self.instance_id,
                CopyState.LOADED,
                size_bytes=size_bytes,
                claimed_at_ms=self.claimed_at_ms.get(model_id, copy.loaded_at_ms),
                loaded_at_ms=copy.loaded_at_ms,
                pinned=copy.pinned,
            )
        )
        if measured.differs(record, size_bytes):
            self._spawn(measured.write_back(self._store, model_id, size_bytes))

    def _withdraw(self, model_id: str) -> None:
        """No new requests; those inside hold the Servable themselves."""
        self._publisher.remove_copy(model_id)
        self.claimed_at_ms.pop(model_id, None)
        copy = self.cache.get(model_id)
        if self.servables.pop(model_id, None) is not None and copy is not None:
            self.use_book.leaves(copy, self.policy.use_half_life_ms)
        if copy is None:
            self.records.pop(model_id, None)
            self.loader.forget(model_id)

    def _start_unload(self, instruction: StartUnload) -> None:
        model_id = instruction.model_id
        self._metrics.counter("evictions", instruction.reason.value)
        if instruction.reason is Reason.EVICTED:
            self._metrics.observe("age_at_eviction", instruction.idle_ms, model_id)
        why = self._asked_because.pop(model_id, "")
        detail = why or f"unused for {instruction.idle_ms} ms"
        if instruction.second:
            detail += f"; next {instruction.second}"
        kind = "evict" if instruction.reason is Reason.EVICTED else "unload"
        self._note(kind, instruction.reason.value, model_id, detail=detail)
        self.records.pop(model_id, None)
        self.loader.start_unload(model_id)

    def _load_failed(self, ended: LoadEnded) -> None:
        error = ended.error
        assert error is not None
        model_id = ended.model_id
        self._count(model_id, ended.reason.value)
        self._metrics.counter("loadmodel_failure")
        self._note(
            "reject", ended.reason.value, model_id, detail=error.message, level=logging.WARNING
        )
        answer = LoadAnswer(
            LoadOutcome.FAILED, error.message, error.code, size_bytes=ended.size_bytes
        )
        if isinstance(error, NotFound):
            self._flights.end(model_id, answer)
        else:
            self._spawn(self._fail(model_id, answer))

    async def _fail(self, model_id: str, answer: LoadAnswer) -> None:
        await self._failures.record(model_id, answer, self.policy)
        self._flights.end(model_id, answer)

    async def _reject(self, model_id: str, answer: LoadAnswer) -> None:
        await self._failures.withdrawn(model_id)
        self._flights.end(model_id, answer)

    # ---- small things ----

    def _until_gone(self, model_id: str) -> asyncio.Future[None]:
        future = self._gone.get(model_id)
        if future is None:
            future = self._gone[model_id] = asyncio.get_running_loop().create_future()
        return future

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _concurrency(self, record: ModelRecord, model: AnyModel) -> int:
        """What the user says, else the model's own file, within what its own process takes."""
        bound = model.max_concurrency if is_remote(model) else 0
        own = model.options.max_concurrency if isinstance(model, VersionedModel) else None
        said = record.max_concurrency or own or bound or self.policy.default_max_concurrency
        return max(1, min(said, bound) if bound else said)

    def _idle_ms(self, record: ModelRecord) -> int:
        own = record.idle_unload_ms
        return self.policy.idle_unload_ms if own is None else own

    def _count(self, model_id: str, outcome: str) -> None:
        record = self.records.get(model_id)
        self._metrics.counter("loads", record.model_type if record else "", outcome)

    def note_repair(self, reason: str, key: str) -> None:
        """A key in the store that is not as it ought to be."""
        parsed = registry.parse_key(key)
        copied = parsed is not None and parsed.family is registry.Family.COPY
        model_id = parsed.name if parsed is not None and copied else ""
        self._note("repair", reason, model_id, detail=key, level=logging.WARNING)

    def _note(
        self, kind: str, reason: str, model_id: str, *, detail: str = "", level: int = logging.INFO
    ) -> None:
        if self.decisions is not None:
            self.decisions.note(
                kind,
                reason,
                model_id=model_id,
                instance_id=self.instance_id,
                detail=detail,
                level=level,
            )

    def _use_of(self, model_id: str) -> tuple[int, float]:
        """Last use (Unix milliseconds) and score of a copy that is here."""
        copy = self.cache.get(model_id)
        if copy is None:
            return 0, 0.0
        score = self.use_book.score(copy, self.policy.use_half_life_ms)
        return copy.use.last_used_at_ms, score

    def copies(self) -> list[Copy]:
        return self.cache.copies()


def _wished(record: ModelRecord) -> Wished:
    wait_ms = record.max_batch_latency_ms
    return Wished(record.max_batch_size, None if wait_ms is None else wait_ms * 1_000)


def _kept(record: ModelRecord) -> bool:
    """A soft minimum: these copies go after all others."""
    return record.min_copies >= 2


def _rejected(model_id: str, why: str) -> LoadAnswer:
    return LoadAnswer(LoadOutcome.REJECTED, f"model {model_id!r} is not loaded here: {why}")
