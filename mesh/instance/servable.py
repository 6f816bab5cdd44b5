"""A loaded copy as the request path sees it: the model, its codec, its measured times, its queue.

Owned by the event loop; worker threads only call ``model.infer``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast

from mesh.core.batching import Wished
from mesh.core.policy import Policy
from mesh.core.usage import Use
from mesh.instance.batching import Batching
from mesh.metrics import Histogram
from mesh.oip.tensors import InferCodec
from mesh.runtimes.api import (
    AnyModel,
    InternalModel,
    LoadedModel,
    ModelMetadata,
    VersionedModel,
    is_remote,
)

if TYPE_CHECKING:
    from mesh.instance.carrier import Waiting
    from mesh.instance.job import Job

# What is said of a model that only its own process knows.
_UNKNOWN: Final = ModelMetadata("external", (), (), (), accepts_any_input=True)

_NOBODY: Final[deque[Waiting]] = deque(maxlen=0)

# Messages up to this size may be decoded, run and encoded in the event loop; a larger one costs
# the loop too long to copy, whatever the model does with it.
INLINE_BYTES_MAX: Final = 64 * 1024

# Requests that go to threads after an inline run that held up the loop and was not paid for; four
# times as many after each further one, so that a model that sleeps is found out.
_PAUSE_FIRST: Final = 16
_PAUSE_MAX: Final = 16_384
# Inline runs that pay for a hold-up at most: a lost time slice of 75 ms, with the usual allowance.
_PAYING_RUNS_MAX: Final = 512

# A time is remembered for each power of two of the message's size: a model that is quick with one
# row is not with a thousand.
_SIZE_CLASSES: Final = INLINE_BYTES_MAX.bit_length() + 1


class Statistics:
    """Counts and nanoseconds since the copy was loaded (ModelStatistics, describe). ``rows``: of
    the requests that were answered; one of a request that does not tell."""

    __slots__ = (
        "decode_ns",
        "encode_ns",
        "fail_count",
        "fail_ns",
        "infer_ns",
        "queue_count",
        "queue_ns",
        "rows",
        "success_count",
        "success_ns",
    )

    def __init__(self) -> None:
        self.success_count = self.success_ns = self.rows = 0
        self.fail_count = self.fail_ns = 0
        self.queue_count = self.queue_ns = 0
        self.decode_ns = self.infer_ns = self.encode_ns = 0

    @property
    def inline_count(self) -> int:
        """Successes in the event loop: the others went through a queue."""
        return self.success_count - self.queue_count


class Servable:
    """``estimates`` are nanoseconds by class of size, 0 where nothing was measured yet.

    ``remote`` is set for a model in another process, ``versions`` for one of several versions: by
    name, each a servable of its own that shares ``use``; this one is the latest. ``special`` is
    True for both: all that the hit path of an ordinary model looks at.
    """

    __slots__ = (
        "_next_pause",
        "_unpaid_since",
        "answered",
        "batch",
        "carried",
        "codec",
        "collects",
        "estimates",
        "inline_pause",
        "max_concurrency",
        "metadata",
        "model",
        "model_id",
        "model_type",
        "queue",
        "queued_ready",
        "remote",
        "running",
        "size_bytes",
        "special",
        "statistics",
        "use",
        "versions",
    )

    def __init__(
        self, model_id: str, model_type: str, model: AnyModel, use: Use, max_concurrency: int
    ) -> None:
        self.model_id = model_id
        self.model_type = model_type
        self.size_bytes = model.size_bytes
        self.remote = model if is_remote(model) else None
        self.versions: dict[str, Servable] | None = None
        names: tuple[str, ...] = ()
        said = Wished()  # of joining requests, by the model's own file
        if isinstance(model, VersionedModel):
            names, latest = tuple(filter(None, model.versions)), model.latest
            said = Wished(model.options.max_batch_size, model.options.max_latency_us)
            if len(names) > 1:
                self.versions = {
                    name: Servable(
                        model_id,
                        model_type,
                        VersionedModel({name: one}, model.options),
                        use,
                        max_concurrency,
                    )
                    for name, one in model.versions.items()
                }
            model = latest
        self.special = self.remote is not None or self.versions is not None
        # Never asked to infer where ``remote`` is set.
        self.model = cast(LoadedModel, model)
        metadata = model.metadata or _UNKNOWN
        self.metadata = replace(metadata, versions=names) if names else metadata
        self.codec = InferCodec(self.metadata)
        self.use = use
        self.batch = Batching(metadata, said, remote=self.remote is not None)
        # Its requests are held to the end of the turn, to be joined or to try whether that pays.
        self.collects = self.batch.on
        self.max_concurrency = max_concurrency
        self.estimates = [0] * _SIZE_CLASSES
        self.inline_pause = 0  # requests that go to threads before one is tried inline again
        self._next_pause = _PAUSE_FIRST
        self._unpaid_since = 0  # inline runs from this one on have paid for no hold-up yet
        self.running = 0  # in worker threads
        self.queue: deque[Job] = deque()
        # For another process, when it takes no more; nobody has it who needs none.
        self.carried: deque[Waiting] = deque() if self.remote is not None else _NOBODY
        self.queued_ready = False  # stands in the executor's line of copies with work
        self.statistics = Statistics()
        self.answered: dict[str, Histogram] = {}  # where successes are counted, by method

    def use_concurrency(self, max_concurrency: int) -> None:
        self.max_concurrency = max_concurrency
        for one in (self.versions or {}).values():
            one.max_concurrency = max_concurrency

    def use_batching(self, record: Wished, policy: Policy) -> None:
        """What the model's record says of joining requests; the model's own file comes second."""
        if isinstance(self.remote, InternalModel):
            self.remote.use_terms(record, policy)
        self.batch.use(record, policy)
        self.collects = self.batch.on
        for one in (self.versions or {}).values():
            one.use_batching(record, policy)

    def of_version(self, version: str) -> Servable:
        """The servable that answers for this version; what is wrong with it is said there."""
        if not version or self.versions is None:
            return self
        return self.versions.get(version, self)

    def learn(self, size_class: int, elapsed_ns: int) -> None:
        """Moves quickly down and slowly up: the first run of a session is slow, and a thread that
        lost its core for a moment says nothing about the model."""
        known = self.estimates[size_class]
        if known == 0:
            self.estimates[size_class] = elapsed_ns
        elif elapsed_ns < known:
            self.estimates[size_class] = (known + elapsed_ns) >> 1
        else:
            self.estimates[size_class] = known + ((min(elapsed_ns, known << 2) - known) >> 3) + 1

    def held_up_the_loop(self, elapsed_ns: int, allowance_ns: int) -> None:
        """An inline run took far too long: the process lost its core for a moment, or the model
        waits for something, which processor time, what threads are judged by, does not show.

        Every inline run may take ``allowance_ns``. A hold-up that the runs since the last one pay
        for changes nothing; after any other, inline runs are tried ever more rarely.
        """
        done = self.statistics.inline_count
        runs = min(done - self._unpaid_since, _PAYING_RUNS_MAX)
        price = elapsed_ns // allowance_ns
        if price <= runs:
            self._unpaid_since = done - runs + price
            self._next_pause = _PAUSE_FIRST
            return
        self._unpaid_since = done
        self.inline_pause = self._next_pause
        self._next_pause = min(self._next_pause * 4, _PAUSE_MAX)
