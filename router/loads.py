"""Loads that requests wait for: one per model in this router, shared by all who wait.

The steps are ``mesh.core.loads``'; this module carries them out: it counts a placement as pending
in the view, calls the instance, tells the view what came of it and releases the waiting requests
in the order in which they came. A waiter that leaves never cancels a load.

Bounds: ``Policy.max_waiting_per_model`` and ``max_waiting_total`` waiters (RESOURCE_EXHAUSTED past
them), ``Policy.hops_max`` instances asked per load, and for a waiter without a deadline the load
time-out plus ``Policy.queue_timeout_ms`` (then UNAVAILABLE). A waiter with a deadline is ended by
whoever carries its call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final, assert_never

from mesh.core import loads as core
from mesh.core.errors import Code, Internal, MeshError, ResourceExhausted, Unavailable
from mesh.core.placement import Placement
from mesh.core.policy import Policy
from mesh.core.types import LoadPriority
from mesh.core.view import ClusterView
from mesh.metrics import RouterMetrics
from protos import mesh_internal_pb2 as internal
from router.peers import Peers

log = logging.getLogger(__name__)

LOAD_PATH: Final = "/mesh.internal.v1.Instance/Load"
UNLOAD_PATH: Final = "/mesh.internal.v1.Instance/Unload"
# A queue that is full now has moved on when some load has ended.
QUEUE_RETRY_MS: Final = 1_000
_PRIORITY: Final = {
    LoadPriority.AWAITED: internal.LoadRequest.AWAITED,
    LoadPriority.COPY: internal.LoadRequest.COPY,
    LoadPriority.PROACTIVE: internal.LoadRequest.PROACTIVE,
}
UNLOAD_TIMEOUT_S: Final = 10.0

# Called once with the instance that has the copy, or with the error.
Ended = Callable[[str | MeshError], None]


class Waiter:
    """One request in a load's queue."""

    __slots__ = ("ended", "flight", "timer")

    def __init__(self, flight: _Flight, ended: Ended) -> None:
        self.flight: _Flight | None = flight
        self.ended = ended
        self.timer: asyncio.TimerHandle | None = None


class _Flight:
    """One load under way."""

    __slots__ = ("last_used_at_ms", "model_id", "task", "waiters")

    def __init__(self, model_id: str, last_used_at_ms: int) -> None:
        self.model_id = model_id
        self.last_used_at_ms = last_used_at_ms
        self.waiters: dict[Waiter, None] = {}  # in the order in which they came
        self.task: asyncio.Task[None] | None = None


class Loads:
    """Not for more than one event loop. ``now_ms`` is the wall clock's reading."""

    def __init__(
        self,
        view: ClusterView,
        peers: Peers,
        metrics: RouterMetrics,
        *,
        policy: Policy,
        now_ms: Callable[[], int],
    ) -> None:
        self._view = view
        self._peers = peers
        self._metrics = metrics
        self._policy = policy
        self._now_ms = now_ms
        self._flights: dict[str, _Flight] = {}
        self._background: set[asyncio.Task[object]] = set()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a load."""
        return self._waiting

    @property
    def under_way(self) -> tuple[str, ...]:
        """Models that are being loaded for this router."""
        return tuple(self._flights)

    # ---- waiting ----------------------------------------------------------------------------

    def wait(
        self,
        model_id: str,
        ended: Ended,
        *,
        has_deadline: bool,
        exclude: Collection[str] = (),
        last_used_at_ms: int = 0,
    ) -> Waiter:
        """Have the model loaded (or join the load) and call ``ended`` once when that is over.

        ``exclude`` are instances that the request could not reach. ``ended`` is never called from
        within this call. Raises what makes a load impossible or not wanted now: the cause of a
        recorded failure, no place for it, or ResourceExhausted when too many wait.
        """
        flight = self._flights.get(model_id)
        waiting_here = len(flight.waiters) if flight is not None else 0
        if self._waiting >= self._policy.max_waiting_total:
            raise ResourceExhausted(
                f"{self._waiting} requests wait for models to be loaded: try again later",
                retry_after_ms=QUEUE_RETRY_MS,
            )
        if waiting_here >= self._policy.max_waiting_per_model:
            raise ResourceExhausted(
                f"{waiting_here} requests wait for model {model_id!r} to be loaded: "
                "try again later",
                retry_after_ms=QUEUE_RETRY_MS,
            )
        if flight is None:
            flight = self._start(model_id, exclude, last_used_at_ms)
        waiter = Waiter(flight, ended)
        flight.waiters[waiter] = None
        self._waiting += 1
        if not has_deadline:
            timeout_ms = self._load_timeout_ms(model_id) + self._policy.queue_timeout_ms
            loop = asyncio.get_running_loop()
            waiter.timer = loop.call_later(timeout_ms / 1_000, self._expire, waiter, timeout_ms)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """The request went away. The load goes on."""
        flight = waiter.flight
        if flight is None:
            return
        waiter.flight = None
        del flight.waiters[waiter]
        self._waiting -= 1
        if waiter.timer is not None:
            waiter.timer.cancel()

    async def load(self, model_id: str, *, last_used_at_ms: int = 0) -> str:
        """Have the model loaded and return the instance. Cancelling it cancels no load."""
        loaded_on = self._view.loaded_on(model_id)
        if loaded_on:
            return loaded_on[0]
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def tell(result: str | MeshError) -> None:
            if ended.done():
                return
            if isinstance(result, MeshError):
                ended.set_exception(result)
            else:
                ended.set_result(result)

        waiter = self.wait(model_id, tell, has_deadline=False, last_used_at_ms=last_used_at_ms)
        try:
            return await ended
        finally:
            self.leave(waiter)

    def begin(self, model_id: str, *, last_used_at_ms: int = 0) -> None:
        """Have the model loaded; nobody waits. Raises as ``wait`` does."""
        if model_id not in self._flights and not self._view.loaded_on(model_id):
            self._start(model_id, (), last_used_at_ms)

    async def close(self) -> None:
        """End all waiting with UNAVAILABLE. Loads go on in their instances."""
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in (*tasks, *self._background):
            task.cancel()
        await asyncio.gather(*tasks, *self._background, return_exceptions=True)

    # ---- single calls, also the leader's ----------------------------------------------------

    async def ask(
        self,
        model_id: str,
        instance_id: str,
        *,
        size_bytes: int | None,
        last_used_at_ms: int = 0,
        priority: LoadPriority = LoadPriority.AWAITED,
    ) -> core.Outcome:
        """One Load call. ``size_bytes`` is None for a load that somebody else has claimed already.

        The view is told what came of it: a copy becomes routable at once, a failure is known.
        """
        now_ms = self._now_ms()
        view = self._view
        if size_bytes is not None:
            view.add_pending(model_id, instance_id, size_bytes=size_bytes, now_ms=now_ms)
        request = internal.LoadRequest(
            model_id=model_id,
            revision=view.revision,
            last_used_at_ms=last_used_at_ms or now_ms,
            priority=_PRIORITY[priority],
        )
        timeout_ms = self._load_timeout_ms(model_id) + self._policy.queue_timeout_ms
        try:
            channel = self._peers.channel(instance_id)
            reply = await channel.unary(
                LOAD_PATH, request.SerializeToString(), timeout_s=timeout_ms / 1_000
            )
            answer = internal.LoadResponse.FromString(reply.message)
            outcome = self._outcome(model_id, instance_id, answer)
        except MeshError as error:
            outcome = core.Unreachable(instance_id, error.message)
        except ValueError as error:  # protobuf's DecodeError is one
            outcome = core.Unreachable(instance_id, f"its answer cannot be read: {error}")
        finally:
            view.drop_pending(model_id, instance_id)
        self._metrics.counter("loads_requested", _label(outcome))
        log.info("load %s on %s: %s", model_id, instance_id, outcome)
        return outcome

    def _outcome(
        self, model_id: str, instance_id: str, answer: internal.LoadResponse
    ) -> core.Outcome:
        now_ms = self._now_ms()
        match answer.outcome:
            case internal.LoadResponse.LOADED:
                self._view.mark_loaded(
                    model_id,
                    instance_id,
                    size_bytes=answer.size_bytes,
                    copy_revision=answer.copy_revision,
                    now_ms=now_ms,
                )
                return core.Loaded(instance_id)
            case internal.LoadResponse.CLAIMED_ELSEWHERE:
                return core.ClaimedElsewhere(instance_id, answer.claimed_instance_id)
            case internal.LoadResponse.FAILED:
                known = answer.code in Code._value2member_map_ and answer.code != Code.OK
                code = Code(answer.code) if known else Code.UNAVAILABLE
                self._view.put_failure(
                    core.failure_record(
                        model_id,
                        instance_id,
                        code,
                        answer.message,
                        now_ms=now_ms,
                        policy=self._policy,
                    )
                )
                return core.Failed(instance_id, code, answer.message)
            case internal.LoadResponse.REJECTED:
                return core.Rejected(instance_id, answer.message)
            case _:
                return core.Unreachable(instance_id, f"unknown outcome {answer.outcome}")

    def ask_soon(self, model_id: str, placement: Placement, *, priority: LoadPriority) -> None:
        """``ask`` in the background, counted as pending from now on; the view tells the rest.

        For loads that nobody waits for: of a minimum of copies, or ahead of the first request.
        """
        self._metrics.counter("placements", placement.reason)
        self._view.add_pending(
            model_id,
            placement.instance_id,
            size_bytes=placement.size_bytes,
            now_ms=self._now_ms(),
        )
        self._in_background(
            self.ask(
                model_id,
                placement.instance_id,
                size_bytes=placement.size_bytes,
                last_used_at_ms=self._view.last_used_at_ms(model_id),
                priority=priority,
            )
        )

    def _in_background(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def unload(self, model_id: str, instance_id: str) -> bool:
        """Drop one copy once its requests have ended; whether it was there. Raises MeshError."""
        request = internal.UnloadRequest(model_id=model_id)
        reply = await self._peers.channel(instance_id).unary(
            UNLOAD_PATH, request.SerializeToString(), timeout_s=UNLOAD_TIMEOUT_S
        )
        self._view.delete_copy(model_id, instance_id)
        return bool(internal.UnloadResponse.FromString(reply.message).was_here)

    def unload_soon(self, model_id: str, instance_ids: Collection[str]) -> None:
        """Unload copies of a model that was deleted, in the background.

        What fails here is done by the leader's sweep, which unloads copies of no model.
        """
        for instance_id in instance_ids:
            self._in_background(self._try_unload(model_id, instance_id))

    async def _try_unload(self, model_id: str, instance_id: str) -> None:
        try:
            await self.unload(model_id, instance_id)
        except MeshError as error:
            log.info("unload %s on %s: %s", model_id, instance_id, error.message)

    # ---- a load -----------------------------------------------------------------------------

    def _start(self, model_id: str, exclude: Collection[str], last_used_at_ms: int) -> _Flight:
        """Decide the first step here and now, so that what is impossible costs no task."""
        state, step = core.first_step(
            self._view, model_id, now_ms=self._now_ms(), policy=self._policy, exclude=exclude
        )
        if isinstance(step, core.GiveUp):
            raise step.error()
        flight = _Flight(model_id, last_used_at_ms)
        self._flights[model_id] = flight
        flight.task = asyncio.get_running_loop().create_task(self._run(flight, state, step))
        return flight

    async def _run(self, flight: _Flight, state: core.LoadState, step: core.Step) -> None:
        result: str | MeshError = Unavailable(
            "the router is shutting down", retry_after_ms=QUEUE_RETRY_MS
        )
        try:
            result = await self._steps(flight, state, step)
        except Exception as error:  # a defect: those who wait must hear of it all the same
            log.exception("load of %s", flight.model_id)
            result = Internal(f"model {flight.model_id!r} could not be loaded: {error!r}")
        finally:
            self._release(flight, result)

    async def _steps(
        self, flight: _Flight, state: core.LoadState, step: core.Step
    ) -> str | MeshError:
        while True:
            match step:
                case core.Release():
                    return step.instance_id
                case core.GiveUp():
                    log.warning("load %s given up (%s): %s", flight.model_id, step.reason,
                                step.detail)  # fmt: skip
                    return step.error()
                case core.AskLoad():
                    self._metrics.counter("placements", step.reason)
                    outcome = await self.ask(
                        flight.model_id,
                        step.instance_id,
                        size_bytes=None if step.placement is None else step.size_bytes,
                        last_used_at_ms=flight.last_used_at_ms,
                    )
                case _:
                    assert_never(step)
            state, step = core.next_step(
                state, outcome, self._view, now_ms=self._now_ms(), policy=self._policy
            )

    def _release(self, flight: _Flight, result: str | MeshError) -> None:
        # First, so that a waiter that comes back starts a new load instead of joining this one.
        del self._flights[flight.model_id]
        for waiter in tuple(flight.waiters):
            if waiter.flight is not None:  # it may leave while others are being released
                self.leave(waiter)
                waiter.ended(result)

    def _expire(self, waiter: Waiter, timeout_ms: int) -> None:
        flight = waiter.flight
        if flight is None:
            return
        self.leave(waiter)
        waiter.ended(
            Unavailable(
                f"model {flight.model_id!r} was not loaded within {timeout_ms} ms: try again",
                retry_after_ms=QUEUE_RETRY_MS,
            )
        )

    def _load_timeout_ms(self, model_id: str) -> int:
        model = self._view.models.get(model_id)
        stated = model.load_timeout_ms if model is not None else None
        return stated or self._policy.load_timeout_ms


def _label(outcome: core.Outcome) -> str:
    match outcome:
        case core.Loaded():
            return "loaded"
        case core.ClaimedElsewhere():
            return "claimed_elsewhere"
        case core.Failed():
            return "failed"
        case core.Rejected():
            return "rejected"
        case core.Unreachable():
            return "unreachable"
        case _:
            assert_never(outcome)
