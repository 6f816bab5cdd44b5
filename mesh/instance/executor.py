"""Runs inference: in the event loop while that is cheaper than a hop, else in worker threads.

A request runs inline when its copy's measured time for messages of its size is at most
``inline_max_us`` and this turn of the loop has spent at most ``inline_turn_max_us`` on inference;
what exceeds the turn waits for the next one, in which sockets are served first. Everything else
goes to a bounded set of threads. There the measure is processor time, because waiting for the
interpreter's lock is no time of the model's; inline it is real time, and a copy that held up the
loop for longer than its quick runs make up for is not tried inline again for a while. Copies with
work stand in one line, so that a slow model does not starve the others, and no copy holds all
threads.

Requests for one copy that wait together are joined where that was found to pay (``Batching``): in
threads what stands in the copy's queue; in the event loop what came in one turn of it, which is
held to its end. A joined run counts as one run of the copy.

Bounds: ``max_concurrency`` of the copy at once, ``max_queued_per_copy`` behind them, and
``MAX_HELD_BYTES`` of request bytes altogether; beyond that RESOURCE_EXHAUSTED with the trailer
``mesh-error: overloaded``. A request whose deadline has passed or whose client is gone is
dropped before it runs. No task, lock or log line per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from time import monotonic, perf_counter_ns
from typing import Final

from mesh.core.batching import beside
from mesh.core.errors import DeadlineExceeded, MeshError, ResourceExhausted
from mesh.core.policy import Policy
from mesh.instance.forms import Form, Sink
from mesh.instance.job import Job, JoinedJob, unexpected
from mesh.instance.joining import Joining
from mesh.instance.servable import INLINE_BYTES_MAX, Servable
from mesh.metrics import Histogram, InstanceMetrics
from mesh.oip.call import InferCall, rows_of
from mesh.runtimes.api import ModelLost, Tensor

log = logging.getLogger(__name__)

# Request bytes that may wait for threads; requests of the largest size, 16 at once.
MAX_HELD_BYTES: Final = 256 * 1024 * 1024
# Inline requests that wait for the next turn of the loop; beyond that threads help.
MAX_DEFERRED: Final = 256
_COARSE_NS: Final = 2_000_000
OVERLOADED: Final = (("mesh-error", "overloaded"),)
NOT_HERE: Final = (("mesh-error", "not-here"),)


class Executor:
    """See the module's docstring. ``cores``: for inference; 0: all that this process may use.
    ``on_idle(model_id)`` is called when a copy's last request in flight has ended and
    ``idle_wanted()`` says that somebody waits for that, ``on_lost(model_id)`` when its runtime says
    that it has the model no more, ``on_batching(model_id, reason, detail)`` when its requests are
    joined from now on, or no more."""

    def __init__(
        self,
        policy: Policy,
        threads: int,
        metrics: InstanceMetrics,
        clock_offset_ms: int,
        *,
        on_idle: Callable[[str], None],
        idle_wanted: Callable[[], bool],
        cores: int = 0,
        on_lost: Callable[[str], None] = lambda model_id: None,
        on_batching: Callable[[str, str, str], None] = lambda model_id, reason, detail: None,
    ) -> None:
        self.use_policy(policy)
        self._metrics = metrics
        self._offset_ms = clock_offset_ms
        self._on_idle = on_idle
        self._idle_wanted = idle_wanted
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._turn_ns = 0
        self._turn_open = False
        self._deferred: deque[Job] = deque()
        self._ready: deque[Servable] = deque()  # copies with queued work, first come first served
        self._active = 0  # runs handed to threads
        self._inside = 0  # their requests
        self._joining = Joining(self, metrics, on_batching)
        self._held_bytes = 0
        self.queued = 0
        self.requests = 0  # since the start
        self._work: SimpleQueue[Job | JoinedJob | None] = SimpleQueue()
        self._done: deque[Job | JoinedJob] = deque()
        self._woken = False
        self._thread_count = threads
        self._cores = cores or len(os.sched_getaffinity(0))
        self._per_copy = max(1, threads - 1)
        self._threads = [
            threading.Thread(target=self._worker, name=f"infer-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def use_policy(self, policy: Policy) -> None:
        """Other thresholds from now on."""
        self.policy = policy
        self._inline_max_ns = policy.inline_max_us * 1_000
        self._turn_max_ns = policy.inline_turn_max_us * 1_000
        self._turn_light_ns = self._turn_max_ns // 4
        self._held_up_ns = 8 * self._inline_max_ns
        self._max_queued = policy.max_queued_per_copy

    def close(self) -> None:
        for _ in self._threads:
            self._work.put(None)

    @property
    def busy(self) -> int:
        """Requests that have not been answered."""
        return self._inside + self.queued + self._joining.held + len(self._deferred)

    # ---- the hot path ----

    def submit(
        self, servable: Servable, form: Form, sink: Sink, message: bytes, method: str
    ) -> None:
        now_ns = perf_counter_ns()
        self.requests += 1
        use = servable.use
        use.last_used_at_ms = self._offset_ms + now_ns // 1_000_000
        use.uses += 1
        size = len(message)
        if size <= INLINE_BYTES_MAX:
            if servable.collects:
                self._joining.hold(servable, form, sink, message, method, now_ns)
                return
            size_class = size.bit_length()
            estimate = servable.estimates[size_class]
            if 0 < estimate <= self._inline_max_ns and not servable.inline_pause:
                if not self._deferred and self._turn_ns + estimate <= self._turn_max_ns:
                    self._run_inline(
                        servable, form, sink, message, method, now_ns, now_ns, size_class
                    )
                    return
                if len(self._deferred) < MAX_DEFERRED:
                    servable.use.in_flight += 1
                    self._deferred.append(Job(servable, form, sink, message, method, now_ns))
                    if not self._turn_open:
                        self._open_turn()
                    return
        self._enqueue(servable, form, sink, message, method, now_ns)

    def _run_inline(
        self,
        servable: Servable,
        form: Form,
        sink: Sink,
        message: bytes,
        method: str,
        arrived_ns: int,
        started_ns: int,
        size_class: int,
    ) -> None:
        codec = servable.codec
        try:
            call = form.decode(codec, message)
            inputs, _, head = call
            decoded_ns = perf_counter_ns()
            tensors = servable.model.infer(inputs, head.output_names, head.parameters)
            inferred_ns = perf_counter_ns()
            reply, initial = form.encode(codec, call, tensors)
            sink.reply(reply, initial=initial)
            ended_ns = perf_counter_ns()
        except MeshError as error:
            ended_ns = self._failed_inline(servable, sink, method, error, arrived_ns)
        except Exception as error:
            log.exception("inference with model %r failed", servable.model_id)
            wrapped = unexpected(servable, error)
            ended_ns = self._failed_inline(servable, sink, method, wrapped, arrived_ns)
        else:
            statistics = servable.statistics
            statistics.success_count += 1
            rows = head.rows
            statistics.rows += rows if rows > 0 else rows_of(call, servable.metadata) or 1
            statistics.success_ns += ended_ns - arrived_ns
            statistics.decode_ns += decoded_ns - started_ns
            statistics.infer_ns += inferred_ns - decoded_ns
            statistics.encode_ns += ended_ns - inferred_ns
            spent_ns = ended_ns - started_ns
            servable.learn(size_class, spent_ns)
            if spent_ns > self._held_up_ns:
                servable.held_up_the_loop(spent_ns, self._inline_max_ns)
            histogram = servable.answered.get(method) or self._answered(servable, method)
            # ``observe``, written out.
            duration_ms = (ended_ns - arrived_ns) / 1e6
            histogram.counts[bisect_left(histogram.bounds, duration_ms)] += 1
            histogram.total += duration_ms
        self._turn_ns += ended_ns - started_ns
        # What a light turn has spent is counted to the next one: that is cheaper than a call_soon.
        if self._turn_ns > self._turn_light_ns and not self._turn_open:
            self._open_turn()
            # Of the copies that run often one is met here soon, at no cost for the others.
            if servable.statistics.success_count >= servable.batch.hold_from:
                servable.collects = True

    def _failed_inline(
        self, servable: Servable, sink: Sink, method: str, error: MeshError, arrived_ns: int
    ) -> int:
        """When it ended."""
        self.fail(servable, sink, error)
        ended_ns = perf_counter_ns()
        servable.statistics.fail_count += 1
        servable.statistics.fail_ns += ended_ns - arrived_ns
        self._metrics.invoke_done(
            method, int(error.code), (ended_ns - arrived_ns) / 1e6, servable.model_id
        )
        return ended_ns

    def fail(self, servable: Servable, sink: Sink, error: MeshError) -> None:
        """A model that its runtime has lost is not here: the router has it loaded anew."""
        if isinstance(error, ModelLost):
            self._on_lost(servable.model_id)
            sink.fail(error, trailers=NOT_HERE)
        else:
            sink.fail(error)

    def has_room(self, predicted_ns: int) -> bool:
        """Whether a run that will take so long (0: unknown) may be in this turn of the loop."""
        return (
            0 < predicted_ns <= self._inline_max_ns
            and self._turn_ns + predicted_ns <= self._turn_max_ns
        )

    def spent(self, servable: Servable, run_ns: int, all_ns: int) -> None:
        """A run in this turn, and all that it took the loop."""
        if run_ns > self._held_up_ns:
            servable.held_up_the_loop(run_ns, self._inline_max_ns)
        self._turn_ns += all_ns
        if self._turn_ns > self._turn_light_ns and not self._turn_open:
            self._open_turn()

    def _open_turn(self) -> None:
        """``call_soon`` runs in the next turn of the loop: then the budget is new."""
        self._turn_open = True
        self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._turn_open = False
        self._turn_ns = 0
        while self._deferred and self._turn_ns < self._turn_max_ns:
            job = self._deferred.popleft()
            servable = job.servable
            if not self.expired(job):
                size_class = len(job.message).bit_length()
                self._run_inline(
                    servable,
                    job.form,
                    job.sink,
                    job.message,
                    job.method,
                    job.queued_ns,
                    perf_counter_ns(),
                    size_class,
                )
            self._leave(servable)
        if self._deferred and not self._turn_open:
            self._open_turn()

    # ---- threads ----

    def _enqueue(
        self,
        servable: Servable,
        form: Form,
        sink: Sink,
        message: bytes,
        method: str,
        now_ns: int,
    ) -> None:
        size = len(message)
        if servable.inline_pause:
            servable.inline_pause -= 1
        if not self.admitted(servable, sink, method, size):
            return
        job = Job(servable, form, sink, message, method, now_ns)
        if size <= INLINE_BYTES_MAX:
            try:
                job.call = form.decode(servable.codec, message)
            except MeshError as error:
                self.answer_error(job, error, now_ns)
                return
        self.enter(job)
        self.to_threads(servable, (job,))

    def admitted(self, servable: Servable, sink: Sink, method: str, size: int) -> bool:
        """Whether there is room for one more that waits; refused where not."""
        bound = servable.max_concurrency + self._max_queued
        waiting = servable.running + len(servable.queue) + len(servable.batch.held)
        if waiting >= bound:
            self._purge(servable)
            waiting = servable.running + len(servable.queue) + len(servable.batch.held)
        if waiting < bound and self._held_bytes + size <= MAX_HELD_BYTES:
            return True
        self._overloaded(servable, sink, method, waiting)
        return False

    def enter(self, job: Job) -> None:
        job.servable.use.in_flight += 1
        self._held_bytes += len(job.message)

    def end(self, job: Job) -> None:
        """It has been answered, or nobody waits for it."""
        self._held_bytes -= len(job.message)
        self._leave(job.servable)

    def to_threads(self, servable: Servable, jobs: Sequence[Job]) -> None:
        """Jobs that have entered."""
        self.queued += len(jobs)
        servable.queue.extend(jobs)
        self._line_up(servable)
        self._dispatch()

    def _overloaded(self, servable: Servable, sink: Sink, method: str, waiting: int) -> None:
        error = ResourceExhausted(
            f"model {servable.model_id!r} has {waiting} requests waiting or running on this "
            "instance; retry later",
            retry_after_ms=100,
        )
        servable.statistics.fail_count += 1
        sink.fail(error, trailers=OVERLOADED)
        self._metrics.invoke_done(method, int(error.code), 0.0, servable.model_id)

    def _line_up(self, servable: Servable) -> None:
        limit = min(servable.max_concurrency, self._per_copy)
        batch = servable.batch
        if batch.on and (
            batch.resuming
            or not beside(
                servable.running, batch.inside, len(servable.queue), self._cores, waits=batch.waits
            )
        ):
            return  # these wait for what is inside
        if servable.queue and not servable.queued_ready and servable.running < limit:
            servable.queued_ready = True
            self._ready.append(servable)

    def _dispatch(self) -> None:
        while self._active < self._thread_count and self._ready:
            servable = self._ready.popleft()
            servable.queued_ready = False
            while servable.queue:
                job = servable.queue.popleft()
                self.queued -= 1
                if self.expired(job):
                    self.end(job)
                    continue
                if servable.queue and job.call is not None:
                    self.start(servable, self._joining.followed(servable, job))
                else:
                    self.start(servable, job)
                break
            self._line_up(servable)

    def start(self, servable: Servable, run: Job | JoinedJob) -> None:
        count = 1 if isinstance(run, Job) else len(run.jobs)
        servable.running += 1
        servable.batch.inside += count
        self._active += 1
        self._inside += count
        self._work.put(run)

    def _worker(self) -> None:
        while (job := self._work.get()) is not None:
            job.run()
            self._done.append(job)
            if not self._woken:
                self._woken = True
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        """Answer everything that threads have done since; one wake-up for many."""
        self._woken = False
        while self._done:
            run = self._done.popleft()
            servable, jobs = run.servable, (run,) if isinstance(run, Job) else run.jobs
            batch = servable.batch
            self._active -= 1
            self._inside -= len(jobs)
            servable.running -= 1
            batch.inside -= len(jobs)
            since_ns = perf_counter_ns()
            for job in jobs:
                self._answer(job)
                self.end(job)
            if isinstance(run, JoinedJob):
                self._joining.ran(run)
            if batch.on and len(servable.queue) < batch.standing.rows:
                # What has arrived meanwhile is read first, so that it can join.
                now_ns = perf_counter_ns()
                batch.ended(len(jobs), len(servable.queue), since_ns, now_ns, self.policy)
                if not batch.resuming:
                    batch.resuming = True
                    self._loop.call_soon(self._resume, servable)
            else:
                self._line_up(servable)
        self._dispatch()

    def _resume(self, servable: Servable) -> None:
        batch = servable.batch
        left_ns = batch.gathering_ns(len(servable.queue), perf_counter_ns())
        if left_ns > _COARSE_NS:  # timers count whole milliseconds
            self._loop.call_later(0.001, self._resume, servable)
            return
        if left_ns > 0:
            self._loop.call_soon(self._resume, servable)
            return
        batch.resuming = False
        self._line_up(servable)
        self._dispatch()

    def _answer(self, job: Job) -> None:
        if job.error is not None:
            self.answer_error(job, job.error, job.queued_ns)
            return
        servable, statistics = job.servable, job.servable.statistics
        try:
            encoded = job.encoded
            if encoded is None:
                assert job.call is not None and job.tensors is not None
                encoded = job.form.encode(servable.codec, job.call, job.tensors)
            reply, initial = encoded
            job.sink.reply(reply, initial=initial)
        except MeshError as error:
            self.answer_error(job, error, job.queued_ns)
            return
        except Exception as error:
            log.exception("encoding an answer of model %r failed", servable.model_id)
            self.answer_error(job, unexpected(servable, error), job.queued_ns)
            return
        ended_ns = perf_counter_ns()
        waited_ns = job.started_ns - job.queued_ns
        statistics.success_count += 1
        statistics.rows += rows_of(_call(job), servable.metadata) or 1
        statistics.success_ns += ended_ns - job.queued_ns
        statistics.queue_count += 1
        statistics.queue_ns += waited_ns
        statistics.infer_ns += job.spent_ns
        if len(job.message) <= INLINE_BYTES_MAX and job.encoded is None and not job.shared:
            servable.learn(len(job.message).bit_length(), job.cpu_ns or 1)
        self._answered(servable, job.method).observe((ended_ns - job.queued_ns) / 1e6)
        self._metrics.observe("req_queue_delay", waited_ns / 1e6, servable.model_id)

    def answer_inline(self, job: Job, tensors: list[Tensor]) -> None:
        """One request of a run in the event loop."""
        servable = job.servable
        try:
            reply, initial = job.form.encode(servable.codec, _call(job), tensors)
            job.sink.reply(reply, initial=initial)
        except MeshError as error:
            self.answer_error(job, error, job.queued_ns)
            return
        except Exception as error:
            log.exception("encoding an answer of model %r failed", servable.model_id)
            self.answer_error(job, unexpected(servable, error), job.queued_ns)
            return
        duration_ns = perf_counter_ns() - job.queued_ns
        statistics = servable.statistics
        statistics.success_count += 1
        statistics.rows += job.rows or 1
        statistics.success_ns += duration_ns
        self._answered(servable, job.method).observe(duration_ns / 1e6)

    def _answered(self, servable: Servable, method: str) -> Histogram:
        histogram = servable.answered.get(method)
        if histogram is None:
            histogram = self._metrics.invoke_histogram(method, 0, servable.model_id)
            servable.answered[method] = histogram
        return histogram

    def answer_error(self, job: Job, error: MeshError, since_ns: int) -> None:
        spent_ns = perf_counter_ns() - since_ns
        job.servable.statistics.fail_count += 1
        job.servable.statistics.fail_ns += spent_ns
        self.fail(job.servable, job.sink, error)
        self._metrics.invoke_done(
            job.method, int(error.code), spent_ns / 1e6, job.servable.model_id
        )

    def expired(self, job: Job) -> bool:
        if job.sink.cancelled:
            return True
        if job.sink.deadline_s > monotonic():
            return False
        self.answer_error(
            job,
            DeadlineExceeded("the deadline passed while the request waited for its model"),
            job.queued_ns,
        )
        return True

    def _purge(self, servable: Servable) -> None:
        """Drop what nobody waits for any more before a live request is refused."""
        kept = [job for job in servable.queue if not self.expired(job)]
        dropped = len(servable.queue) - len(kept)
        if dropped:
            self._held_bytes -= sum(len(j.message) for j in servable.queue) - sum(
                len(j.message) for j in kept
            )
            self.queued -= dropped
            servable.queue.clear()
            servable.queue.extend(kept)
            servable.use.in_flight -= dropped

    def _leave(self, servable: Servable) -> None:
        servable.use.in_flight -= 1
        if not servable.use.in_flight and self._idle_wanted():
            self._on_idle(servable.model_id)


def _call(job: Job) -> InferCall:
    assert job.call is not None
    return job.call
