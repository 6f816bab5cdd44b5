"""Joins requests: in the event loop what one turn of it brings for a copy, which is run at its end,
and for the threads what stands in the copy's queue.

Requests for copies that are joined, or are to be tried, come here (``Servable.collects``).
Where the model's owner states a time, they are held that long. What is not quick enough for the
loop goes to the threads, in the order in which it came. At most ``HELD_MAX`` are held of a copy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from mesh.core.batching import Times
from mesh.core.errors import MeshError
from mesh.instance.batching import alike
from mesh.instance.forms import Form, Sink
from mesh.instance.job import Job, JoinedJob, infer_joined, unexpected
from mesh.instance.servable import Servable
from mesh.metrics import InstanceMetrics
from mesh.oip.call import rows_of

if TYPE_CHECKING:
    from mesh.instance.executor import Executor

log = logging.getLogger(__name__)

HELD_MAX: Final = 256
# Requests of so many kinds are joined side by side; the oldest gives way to a further one.
_KINDS_MAX: Final = 4
# Jobs of a queue that are looked at for those that fit the first one, for each that may be joined.
_LOOKED_AT: Final = 4


class Joining:
    """A part of the executor: see there for the bounds."""

    def __init__(
        self,
        executor: Executor,
        metrics: InstanceMetrics,
        on_batching: Callable[[str, str, str], None],
    ) -> None:
        self._executor = executor
        self._metrics = metrics
        self._on_batching = on_batching
        self._loop = asyncio.get_running_loop()
        self.held = 0  # requests, of all copies

    def hold(
        self,
        servable: Servable,
        form: Form,
        sink: Sink,
        message: bytes,
        method: str,
        now_ns: int,
    ) -> None:
        executor, batch = self._executor, servable.batch
        if not executor.admitted(servable, sink, method, len(message)):
            return
        job = Job(servable, form, sink, message, method, now_ns)
        try:
            call = job.call = form.decode(servable.codec, message)
        except MeshError as error:
            executor.answer_error(job, error, now_ns)
            return
        job.rows = rows_of(call, servable.metadata)
        executor.enter(job)
        self.held += 1
        batch.held.append(job)
        batch.held_rows += job.rows or 1
        wait_us = batch.wait_us
        if len(batch.held) >= HELD_MAX or (wait_us and batch.held_rows >= batch.standing.rows):
            self._release(servable)
        elif batch.timer is None:
            if wait_us:
                batch.timer = self._loop.call_later(wait_us / 1e6, self._release, servable)
            else:
                batch.timer = self._loop.call_soon(self._release, servable)

    def _release(self, servable: Servable) -> None:
        """Run what was held, or have it run."""
        executor, batch = self._executor, servable.batch
        if batch.timer is not None:
            batch.timer.cancel()
            batch.timer = None
        held, batch.held, batch.held_rows = batch.held, [], 0
        self.held -= len(held)
        jobs = []
        for job in held:
            if executor.expired(job):
                executor.end(job)
            else:
                jobs.append(job)
        if not jobs:
            return
        answered = servable.statistics.success_count
        if not batch.came(len(jobs), answered):
            servable.collects = False
        trial = len(jobs) > 1 and not batch.trying and answered >= batch.next_trial
        if trial or servable.inline_pause:
            servable.inline_pause = max(0, servable.inline_pause - len(jobs))
            executor.to_threads(servable, jobs)
            return
        left: list[Job] = []
        for group in grouped(jobs, batch.standing.rows if batch.on else 1):
            if not self._run(servable, group):
                left += group
        if left:
            executor.to_threads(servable, left)

    def _run(self, servable: Servable, jobs: list[Job]) -> bool:
        """In the event loop; whether it was quick enough for that."""
        executor, batch = self._executor, servable.batch
        alone = len(jobs) == 1
        rows = sum(job.rows for job in jobs)
        size_class = len(jobs[0].message).bit_length()
        predicted_ns = servable.estimates[size_class] if alone else batch.predicted_ns(rows)
        if not executor.has_room(predicted_ns):
            return False
        started_ns = perf_counter_ns()
        try:
            answers = infer_joined(servable, jobs, rows)
        except Exception as error:
            if alone:
                self._failed(jobs[0], error)
            else:  # in a thread each is run alone, and the guilty one answered
                executor.start(servable, JoinedJob(servable, jobs, rows, broken=error))
            executor.spent(servable, 0, perf_counter_ns() - started_ns)
            return True
        inferred_ns = perf_counter_ns()
        run_ns = inferred_ns - started_ns
        if alone:
            servable.learn(size_class, run_ns)
        else:
            batch.ran(len(jobs), rows, Times(run_ns, run_ns))
        self._metrics.observe("batch_size", rows, servable.model_id)
        statistics = servable.statistics
        statistics.infer_ns += run_ns
        answer = executor.answer_inline
        for job, tensors in zip(jobs, answers, strict=True):
            answer(job, tensors)
            executor.end(job)
        ended_ns = perf_counter_ns()
        statistics.encode_ns += ended_ns - inferred_ns
        executor.spent(servable, run_ns, ended_ns - started_ns)
        return True

    def _failed(self, job: Job, error: Exception) -> None:
        """Its own error, and it has run: a second run could say something else."""
        if not isinstance(error, MeshError):
            log.error("inference with model %r failed", job.servable.model_id, exc_info=error)
            error = unexpected(job.servable, error)
        self._executor.answer_error(job, error, job.queued_ns)
        self._executor.end(job)

    # ---- threads ----

    def followed(self, servable: Servable, job: Job) -> Job | JoinedJob:
        """The job, joined with what waits behind it and fits it where that pays or is to be tried;
        the others keep their places."""
        executor, batch = self._executor, servable.batch
        trying = not batch.trying and servable.statistics.success_count >= batch.next_trial
        if not (batch.on or trying):
            return job
        if job.rows < 0:
            job.rows = _rows_of(job)
        rows_max = batch.standing.rows
        if not 0 < job.rows < rows_max:
            return job
        jobs, rows, passed = [job], job.rows, []
        count_max = executor.policy.batch_trial_requests if trying else rows_max
        for _ in range(min(len(servable.queue), _LOOKED_AT * rows_max)):
            if rows >= rows_max or len(jobs) >= count_max:
                break
            other = servable.queue.popleft()
            if executor.expired(other):
                executor.queued -= 1
                executor.end(other)
                continue
            if other.rows < 0:
                other.rows = _rows_of(other)
            if 0 < other.rows <= rows_max - rows and _alike(job, other):
                executor.queued -= 1
                jobs.append(other)
                rows += other.rows
            else:
                passed.append(other)
        servable.queue.extendleft(reversed(passed))
        if len(jobs) == 1:
            return job
        if trying:
            batch.trying = True
        else:
            servable.collects = True
        return JoinedJob(servable, jobs, rows, trying=trying)

    def ran(self, run: JoinedJob) -> None:
        """What a joined run, or a trial, says of joining."""
        servable, batch = run.servable, run.servable.batch
        before, answered = batch.standing, servable.statistics.success_count
        if run.trying:
            batch.trying = False
            batch.judge(run.trial, answered, self._executor.policy)
        elif run.blamed:
            batch.blame(answered)
        elif run.spent is not None:
            batch.ran(len(run.jobs), run.rows, run.spent)
            self._metrics.observe("batch_size", run.rows, servable.model_id)
        now = batch.standing
        if (now.stage, now.reason) != (before.stage, before.reason):
            servable.collects = batch.on
            self._on_batching(servable.model_id, now.reason.value, f"gain {now.gain:.2f}")


def grouped(jobs: Sequence[Job], rows_max: int) -> list[list[Job]]:
    """Those that fit together, at most ``rows_max`` rows each (more if one request has more); a
    request that cannot be joined is alone."""
    groups: list[list[Job]] = []
    open_: list[tuple[list[Job], int]] = []
    for job in jobs:
        for index, (group, rows) in enumerate(open_):
            if rows + job.rows <= rows_max and job.rows and _alike(group[0], job):
                group.append(job)
                open_[index] = (group, rows + job.rows)
                break
        else:
            fresh = [job]
            groups.append(fresh)
            if 0 < job.rows < rows_max:
                open_ = [*open_[-_KINDS_MAX + 1 :], (fresh, job.rows)]
    return groups


def _rows_of(job: Job) -> int:
    """0 where it has not been decoded yet: a large message."""
    return 0 if job.call is None else rows_of(job.call, job.servable.metadata)


def _alike(one: Job, other: Job) -> bool:
    assert one.call is not None and other.call is not None
    return alike(one.call, other.call)
