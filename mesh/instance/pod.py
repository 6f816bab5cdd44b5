"""The copies of one serving pod: feeds the cache with events and carries out its instructions.

Owns who waits for a load (one ``Flight`` a model: everybody joins it, cancelling a waiter never
cancels it), the claim that goes before it, and what is published of it. Decides nothing about
memory (``mesh.core.cache``) and touches no file or runtime (``mesh.instance.loader``).

Everything runs in the event loop; ``servables`` is what the request path looks up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final, assert_never

from mesh import registry
from mesh.artifacts import ArtifactSource
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
from mesh.core.errors import RETRYABLE, Code, MeshError, NotFound
from mesh.core.policy import Policy
from mesh.core.types import CopyRecord, CopyState, FailureRecord, LoadPriority, ModelRecord
from mesh.instance.answers import LoadAnswer, LoadOutcome
from mesh.instance.clock import Clock
from mesh.instance.loader import Loader, Runtimes
from mesh.instance.publisher import ClaimedElsewhere, Publisher
from mesh.instance.servable import Servable
from mesh.metrics import InstanceMetrics
from mesh.store.api import KVStore, ModRevisionIs, Put

log = logging.getLogger(__name__)

# A new Load for a model whose copy is still being unloaded waits so long for that.
UNLOAD_WAIT_S: Final = 30.0
# A failure or rejection is told only when the store has it, but a store that is away must not hold
# up the answer.
WITHDRAW_FLUSH_S: Final = 1.0
MAX_FAILURES_REMEMBERED: Final = 1_024
# A measured size is written back when it differs by more than this share.
SIZE_CHANGE_SHARE: Final = 0.1
WRITE_BACK_ATTEMPTS: Final = 3
_RANK: Final = {LoadPriority.AWAITED: 0, LoadPriority.COPY: 1, LoadPriority.PROACTIVE: 2}


@dataclass(frozen=True, slots=True)
class Wish:
    """A Load request. ``revision`` is what the router's decision saw."""

    model_id: str
    revision: int
    last_used_at_ms: int = 0
    priority: LoadPriority = LoadPriority.AWAITED
    record: bytes = b""  # as in the store: what is loaded by while the store is away
    pin: bool = False
    use_score: float = 0.0


class Flight:
    """One load, from the first wish to its answer."""

    __slots__ = ("answer", "claim_revision", "in_cache", "record", "wish")

    def __init__(self, wish: Wish, answer: asyncio.Future[LoadAnswer]) -> None:
        self.wish = wish
        self.answer = answer
        self.record: ModelRecord | None = None
        self.claim_revision = 0
        self.in_cache = False


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
    ) -> None:
        self.instance_id = instance_id
        self.cache = Cache(cache_config)
        self.policy = policy
        self.servables: dict[str, Servable] = {}
        self.records: dict[str, ModelRecord] = {}  # of the copies in the cache
        self.claimed_at_ms: dict[str, int] = {}  # of the same
        self.loader = Loader(source, runtimes, metrics, self.apply)
        self._store = store
        self._publisher = publisher
        self._metrics = metrics
        self._clock = clock
        self._flights: dict[str, Flight] = {}
        self._gone: dict[str, asyncio.Future[None]] = {}
        self._failed: dict[str, tuple[int, LoadAnswer]] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self.evicted_last_used: dict[str, int] = {}  # since the last flush of last uses

    # ---- wishes ----

    async def load(self, wish: Wish) -> LoadAnswer:
        """Returns when the load has ended, however it did."""
        servable = self.servables.get(wish.model_id)
        if servable is not None:
            servable.use.last_used_at_ms = max(servable.use.last_used_at_ms, wish.last_used_at_ms)
            return self._loaded_answer(wish.model_id)
        flight = self._flights.get(wish.model_id)
        if flight is None:
            flight = Flight(wish, asyncio.get_running_loop().create_future())
            self._flights[wish.model_id] = flight
            self._spawn(self._begin(flight))
        elif _RANK[wish.priority] < _RANK[flight.wish.priority]:
            flight.wish = replace(wish, revision=flight.wish.revision)
            copy = self.cache.get(wish.model_id)
            if flight.in_cache and copy is not None and copy.state is not CopyState.UNLOADING:
                self.apply(self._wanted(flight))
        return await asyncio.shield(flight.answer)

    async def unload(self, model_id: str) -> bool:
        """Whether there was a copy; returns when it is gone."""
        if self.cache.get(model_id) is None:
            return False
        self.apply(UnloadWanted(model_id, Reason.ASKED))
        await asyncio.shield(self._until_gone(model_id))
        return True

    def deleted(self, model_id: str) -> None:
        """The model is not registered any more: its requests finish, then it goes."""
        if self.cache.get(model_id) is not None:
            self.apply(UnloadWanted(model_id, Reason.DELETED))

    def record_changed(self, record: ModelRecord) -> None:
        copy = self.cache.get(record.model_id)
        if copy is None or copy.state is CopyState.UNLOADING:
            return
        self.records[record.model_id] = record
        servable = self.servables.get(record.model_id)
        if servable is not None:
            servable.max_concurrency = self._concurrency(record)
        if copy.pinned != record.pinned:
            self.apply(TermsChanged(record.model_id, record.pinned))

    def became_idle(self, model_id: str) -> None:
        self.apply(BecameIdle(model_id))

    def idle_wanted(self) -> bool:
        return self.cache.awaiting_idle

    def tick(self) -> None:
        if self.cache.loading_count:
            self.apply(Tick())

    def drain(self) -> None:
        self.apply(Drain())

    async def close(self) -> None:
        """End the tasks of this pod; nothing is unloaded, the process ends."""
        tasks = [*self._tasks, *(job.task for job in self.loader.jobs.values() if job.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- before the cache: record and claim ----

    async def _begin(self, flight: Flight) -> None:
        try:
            answer = await self._claim(flight)
        except MeshError as error:
            if error.code in RETRYABLE:
                # The store's fault, not the model's: nothing is to be remembered against it.
                answer = _rejected(flight.wish.model_id, error.message)
            else:
                answer = LoadAnswer(LoadOutcome.FAILED, error.message, error.code)
        except Exception:
            log.exception("the load of model %r could not begin", flight.wish.model_id)
            answer = LoadAnswer(
                LoadOutcome.FAILED, "the load could not begin: a defect", Code.INTERNAL
            )
        if answer is not None:
            self._finish(flight, answer)
            return
        assert flight.record is not None
        record = flight.record
        self.records[record.model_id] = record
        self.loader.prepare(record)
        flight.in_cache = True
        self.apply(self._wanted(flight))

    async def _claim(self, flight: Flight) -> LoadAnswer | None:
        """None when the copy is claimed and ``flight.record`` is read."""
        wish = flight.wish
        model_id = wish.model_id
        remembered = self._failed.get(model_id)
        if remembered is not None and wish.revision < remembered[0]:
            return remembered[1]  # the router has not seen yet that it failed here
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
        claim_record = CopyRecord(
            model_id, self.instance_id, CopyState.LOADING, claimed_at_ms=self._clock.now_ms()
        )
        item, claim = await asyncio.gather(
            self._store.get(registry.model_key(model_id)),
            self._publisher.claim(claim_record, wish.revision),
            return_exceptions=True,
        )
        if isinstance(claim, BaseException):
            raise claim
        if isinstance(claim, ClaimedElsewhere):
            return LoadAnswer(
                LoadOutcome.CLAIMED_ELSEWHERE,
                f"model {model_id!r} was claimed elsewhere in the meantime",
                claimed_instance_id=claim.instance_id,
                copy_revision=claim.copy_revision,
            )
        flight.claim_revision = claim.revision
        self.claimed_at_ms[model_id] = claim_record.claimed_at_ms
        try:
            if isinstance(item, BaseException):
                raise item
            if item is None:
                raise NotFound(f"model {model_id!r} is not registered")
            flight.record = registry.decode_model(model_id, item.value)
        except BaseException:
            self._publisher.remove_copy(model_id)
            raise
        return None

    def _wanted(self, flight: Flight) -> LoadWanted:
        record, wish = flight.record, flight.wish
        assert record is not None
        return LoadWanted(
            model_id=wish.model_id,
            size_bytes=record.size_bytes_stated or record.size_bytes_measured or 0,
            timeout_ms=record.load_timeout_ms or self.policy.load_timeout_ms,
            last_used_at_ms=wish.last_used_at_ms,
            priority=wish.priority,
            pinned=record.pinned,
        )

    # ---- the cache ----

    def apply(self, event: Event) -> None:
        """Feed the cache and carry out what it says. Instructions only start things, so this is
        never re-entered."""
        for instruction in self.cache.handle(event, self._clock.now_ms()):
            self._carry_out(instruction)
        if not isinstance(event, Tick | Drain) and self.cache.get(event.model_id) is None:
            self.records.pop(event.model_id, None)
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
                log.info("load of %s rejected: %s", model_id, message)
                answer = LoadAnswer(LoadOutcome.REJECTED, message)
                self._spawn(self._answer_after_flush(model_id, answer))
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
            record = self.records[model_id]
            self.servables[model_id] = Servable(
                model_id,
                record.model_type,
                self.loader.models[model_id],
                copy.use,
                self._concurrency(record),
            )
            self._count(model_id, "loaded")
            log.info(
                "loaded %s: %d bytes in %.1f ms",
                model_id,
                copy.size_bytes,
                self.loader.load_ms.get(model_id, 0.0),
            )
        self._failed.pop(model_id, None)
        self._end_flight(model_id, self._loaded_answer(model_id))

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
            )
        )
        known = record.size_bytes_measured
        if known is None or abs(known - size_bytes) > known * SIZE_CHANGE_SHARE:
            self._spawn(self._write_back(model_id, size_bytes))

    def _withdraw(self, model_id: str) -> None:
        """No new requests; those inside hold the Servable themselves."""
        self._publisher.remove_copy(model_id)
        self.claimed_at_ms.pop(model_id, None)
        servable = self.servables.pop(model_id, None)
        if servable is not None and servable.use.last_used_at_ms:
            self.evicted_last_used[model_id] = servable.use.last_used_at_ms
        if self.cache.get(model_id) is None:
            self.records.pop(model_id, None)
            self.loader.forget(model_id)

    def _start_unload(self, instruction: StartUnload) -> None:
        model_id = instruction.model_id
        self._metrics.counter("evictions", instruction.reason.value)
        if instruction.reason is Reason.EVICTED:
            self._metrics.observe("age_at_eviction", instruction.idle_ms, model_id)
        log.info("unloading %s: %s", model_id, instruction.reason.value)
        self.records.pop(model_id, None)
        self.loader.start_unload(model_id)

    def _load_failed(self, ended: LoadEnded) -> None:
        error = ended.error
        assert error is not None
        model_id = ended.model_id
        self._count(model_id, ended.reason.value)
        self._metrics.counter("loadmodel_failure")
        log.warning("load of %s failed: %s", model_id, error)
        answer = LoadAnswer(
            LoadOutcome.FAILED, error.message, error.code, size_bytes=ended.size_bytes
        )
        if isinstance(error, NotFound):
            self._end_flight(model_id, answer)
        else:
            self._spawn(self._tell_failure(model_id, answer))

    async def _tell_failure(self, model_id: str, answer: LoadAnswer) -> None:
        """Into the store first, then to who waits: no router may try again here at once."""
        transient = answer.code in RETRYABLE
        policy, now_ms = self.policy, self._clock.now_ms()
        expiry_ms = (
            policy.transient_failure_expiry_ms if transient else policy.load_failure_expiry_ms
        )
        self._publisher.put_failure(
            FailureRecord(
                model_id,
                self.instance_id,
                answer.code.name,
                answer.message,
                failed_at_ms=now_ms,
                expires_at_ms=now_ms + expiry_ms,
            )
        )
        if await self._answer_after_flush(model_id, answer):
            while len(self._failed) >= MAX_FAILURES_REMEMBERED:
                del self._failed[next(iter(self._failed))]
            self._failed[model_id] = (self._publisher.revision, answer)

    async def _answer_after_flush(self, model_id: str, answer: LoadAnswer) -> bool:
        """No copy came of it: the claim goes from the store before who waits is told, or the next
        instance that is asked would find it there. False when the store did not take it."""
        written = False
        try:
            async with asyncio.timeout(WITHDRAW_FLUSH_S):
                await self._publisher.flush()
            written = True
        except (MeshError, TimeoutError) as error:
            log.warning("the claim of %s is not withdrawn yet: %s", model_id, error)
        self._end_flight(model_id, answer)
        return written

    # ---- flights ----

    def _end_flight(self, model_id: str, answer: LoadAnswer) -> None:
        flight = self._flights.get(model_id)
        if flight is not None and flight.in_cache:
            self._finish(flight, answer)

    def _finish(self, flight: Flight, answer: LoadAnswer) -> None:
        if self._flights.get(flight.wish.model_id) is flight:
            del self._flights[flight.wish.model_id]
        if not flight.answer.done():
            flight.answer.set_result(answer)

    def _until_gone(self, model_id: str) -> asyncio.Future[None]:
        future = self._gone.get(model_id)
        if future is None:
            future = self._gone[model_id] = asyncio.get_running_loop().create_future()
        return future

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- small things ----

    def _concurrency(self, record: ModelRecord) -> int:
        return max(1, record.max_concurrency or self.policy.default_max_concurrency)

    def _count(self, model_id: str, outcome: str) -> None:
        record = self.records.get(model_id)
        self._metrics.counter("loads", record.model_type if record else "", outcome)

    async def _write_back(self, model_id: str, size_bytes: int) -> None:
        """The measured size is the next load's prediction, wherever that happens."""
        key = registry.model_key(model_id)
        try:
            for _ in range(WRITE_BACK_ATTEMPTS):
                item = await self._store.get(key)
                if item is None:
                    return
                record = replace(
                    registry.decode_model(model_id, item.value), size_bytes_measured=size_bytes
                )
                result = await self._store.txn(
                    [ModRevisionIs(key, item.mod_revision)], [Put(key, registry.encode(record))]
                )
                if result.succeeded:
                    return
        except MeshError as error:
            log.info("the size of %s was not written back: %s", model_id, error)

    def copies(self) -> list[Copy]:
        return self.cache.copies()


def _rejected(model_id: str, why: str) -> LoadAnswer:
    return LoadAnswer(LoadOutcome.REJECTED, f"model {model_id!r} is not loaded here: {why}")
