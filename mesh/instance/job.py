"""One run in a worker thread: a request alone, or several joined.

Owned by one thread at a time. Whatever a model raises ends in the ``error`` of the request that it
belongs to, and nothing else: when a joined run fails, each of its requests is run alone.
"""

from __future__ import annotations

import logging
from time import perf_counter_ns, thread_time_ns

from mesh.core.batching import Times, Trial
from mesh.core.errors import Internal, MeshError
from mesh.instance.batching import agree, all_equal, join, other_row, split
from mesh.instance.forms import Encoded, Form, Sink
from mesh.instance.servable import INLINE_BYTES_MAX, Servable
from mesh.oip.call import InferCall
from mesh.oip.tensors import InferCodec
from mesh.runtimes.api import ModelLost, Tensor

log = logging.getLogger(__name__)


class Job:
    """One request on its way through a worker thread (or waiting for the next turn)."""

    __slots__ = (
        "call",
        "cpu_ns",
        "encoded",
        "error",
        "form",
        "message",
        "method",
        "queued_ns",
        "rows",
        "servable",
        "shared",
        "sink",
        "spent_ns",
        "started_ns",
        "tensors",
    )

    def __init__(
        self, servable: Servable, form: Form, sink: Sink, message: bytes, method: str, now_ns: int
    ) -> None:
        self.servable = servable
        self.form = form
        self.sink = sink
        self.message = message
        self.method = method
        self.queued_ns = now_ns
        self.started_ns = 0
        self.spent_ns = 0
        self.cpu_ns = 0
        self.rows = -1  # 0: cannot be joined; -1: nobody has looked
        self.shared = False  # its times are its share of a joined run
        self.call: InferCall | None = None
        self.tensors: list[Tensor] | None = None
        self.encoded: Encoded | None = None
        self.error: MeshError | None = None

    def run(self) -> None:
        """In a worker thread. Large messages are decoded and encoded here too."""
        self.started_ns = perf_counter_ns()
        started_cpu_ns = thread_time_ns()
        try:
            self.infer()
            self.encode_large()
        except MeshError as error:
            self.error = error
        except Exception as error:
            log.exception("inference with model %r failed", self.servable.model_id)
            self.error = unexpected(self.servable, error)
        # Waiting for the interpreter's lock is no time of the model's.
        self.cpu_ns = thread_time_ns() - started_cpu_ns
        self.spent_ns = perf_counter_ns() - self.started_ns

    def infer(self) -> None:
        call = self.call
        if call is None:
            codec = InferCodec(self.servable.metadata)
            call = self.call = self.form.decode(codec, self.message)
        self.tensors = self.servable.model.infer(call.inputs, call.outputs, call.parameters)

    def encode_large(self) -> None:
        tensors = self.tensors
        if tensors and sum(tensor.data.nbytes for tensor in tensors) > INLINE_BYTES_MAX:
            assert self.call is not None
            codec = InferCodec(self.servable.metadata)
            self.encoded = self.form.encode(codec, self.call, tensors)
            self.tensors = None


class JoinedJob:
    """Several decoded requests that fit together. ``trial``: they are run one by one, which is
    what they are answered with, and joined. ``blamed``: the joined run failed, and alone none did.
    ``broken``: how it has failed already, in the event loop."""

    __slots__ = ("blamed", "broken", "jobs", "rows", "servable", "spent", "trial", "trying")

    def __init__(
        self,
        servable: Servable,
        jobs: list[Job],
        rows: int,
        *,
        trying: bool = False,
        broken: Exception | None = None,
    ) -> None:
        self.servable = servable
        self.jobs = jobs
        self.rows = rows
        self.trying = trying
        self.broken = broken
        self.trial: Trial | None = None
        self.blamed = False
        self.spent: Times | None = None  # by the joined run; None: it did not go well

    def run(self) -> None:
        """In a worker thread."""
        if self.broken is not None:
            self._run_apart(self.broken)
            return
        if self.trying:
            self._try()
            return
        started_ns, started_cpu_ns = perf_counter_ns(), thread_time_ns()
        try:
            answers = infer_joined(self.servable, self.jobs, self.rows)
        except Exception as error:
            self._run_apart(error)
            return
        count = len(self.jobs)
        wall_ns, cpu_ns = perf_counter_ns() - started_ns, thread_time_ns() - started_cpu_ns
        share_ns = wall_ns // count
        self.spent = Times(wall_ns, max(1, cpu_ns))
        for job, tensors in zip(self.jobs, answers, strict=True):
            job.started_ns, job.spent_ns, job.shared = started_ns, share_ns, True
            job.tensors = tensors
            self._encode(job)

    def _run_apart(self, error: Exception) -> None:
        """The joined run has raised: only who is guilty shall fail."""
        for job in self.jobs:
            job.run()
        lost = isinstance(error, ModelLost)
        self.blamed = not lost and all(job.error is None for job in self.jobs)
        if self.blamed:
            log.warning(
                "a joined run of %d requests for model %r failed, and none of them alone: %s",
                len(self.jobs), self.servable.model_id, error,
            )  # fmt: skip

    def _encode(self, job: Job) -> None:
        try:
            job.encode_large()
        except MeshError as error:
            job.error = error
        except Exception as error:
            log.exception("encoding an answer of model %r failed", self.servable.model_id)
            job.error = unexpected(self.servable, error)

    def _try(self) -> None:
        apart_wall_ns = apart_cpu_ns = 0
        for job in self.jobs:
            job.started_ns, started_cpu_ns = perf_counter_ns(), thread_time_ns()
            try:
                job.infer()
            except MeshError as error:
                job.error = error
            except Exception as error:
                log.exception("inference with model %r failed", self.servable.model_id)
                job.error = unexpected(self.servable, error)
            job.cpu_ns = thread_time_ns() - started_cpu_ns
            job.spent_ns = perf_counter_ns() - job.started_ns
            apart_wall_ns += job.spent_ns
            apart_cpu_ns += job.cpu_ns
        if all(job.error is None for job in self.jobs):
            self.trial = self._tried(Times(apart_wall_ns, apart_cpu_ns))
        for job in self.jobs:
            if job.error is None:
                self._encode(job)

    def _tried(self, apart: Times) -> Trial:
        """The joined run, twice: the first of a new shape is slow in some frameworks."""
        same, best = self._compared()
        if same is not False:
            for _ in range(2):
                started_ns, started_cpu_ns = perf_counter_ns(), thread_time_ns()
                try:
                    infer_joined(self.servable, self.jobs, self.rows)
                except Exception as error:
                    log.info("a joined run of %r failed: %s", self.servable.model_id, error)
                    return Trial(len(self.jobs), apart, None)
                now = Times(perf_counter_ns() - started_ns, thread_time_ns() - started_cpu_ns)
                best = now if best is None else min(best, now, key=lambda t: t.cpu_ns)
        return Trial(len(self.jobs), apart, best or Times(0, 0), same)

    def _compared(self) -> tuple[bool | None, Times | None]:
        """Whether joined answers are those of the requests alone; None: cannot be told."""
        parts = [_call(job).inputs for job in self.jobs]
        alone = [job.tensors or [] for job in self.jobs]
        if not all_equal(parts):
            try:
                answers = infer_joined(self.servable, self.jobs, self.rows)
            except Exception:
                return None, None  # told by the runs that are timed
            return all(map(agree, alone, answers)), None
        row = other_row(parts[0])
        if row is None:
            return None, None
        call = _call(self.jobs[0])
        try:
            tensors = self.servable.model.infer(join([*parts, row]), call.outputs, call.parameters)
            answers = split(tensors, [job.rows for job in self.jobs], self.rows + 1)
        except Exception:
            return None, None  # perhaps it does not like the made-up row
        return all(map(agree, alone, answers)), None


def infer_joined(servable: Servable, jobs: list[Job], rows: int) -> list[list[Tensor]]:
    """Each request's tensors."""
    call = jobs[0].call
    assert call is not None
    if len(jobs) == 1:
        return [servable.model.infer(call.inputs, call.outputs, call.parameters)]
    inputs = join([_call(job).inputs for job in jobs])
    tensors = servable.model.infer(inputs, call.outputs, call.parameters)
    return split(tensors, [job.rows for job in jobs], rows)


def _call(job: Job) -> InferCall:
    assert job.call is not None
    return job.call


def unexpected(servable: Servable, error: Exception) -> MeshError:
    return Internal(
        f"model {servable.model_id!r} failed at inference: {type(error).__name__}: {error}"
    )
