"""Joining requests and taking their answers apart, and one copy's batching.

Requests fit together when they have the same inputs (names, datatypes, shapes behind the first
axis), ask for the same outputs and have equal parameters. ``Joinable`` arrays only; what comes of a
trial is decided in ``mesh.core.batching``. The functions know no loop and no thread; a ``Batching``
belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mesh.core import batching as core
from mesh.core.batching import Stage, Standing, Terms, Times, Trial, Wished
from mesh.core.errors import Internal
from mesh.core.policy import Policy
from mesh.oip.call import InferCall
from mesh.oip.datatypes import bf16_to_fp32
from mesh.runtimes.api import Array, ModelMetadata, Tensor, TensorSpec

if TYPE_CHECKING:
    from mesh.instance.job import Job

# Joined answers may differ by so much of themselves, and by a tenth of that of the tensor's largest
# element: kernels for many rows add up in another order. Never less than the datatype's own steps.
_RELATIVE: Final = 1e-5
_ABSOLUTE_SHARE: Final = 0.1
_STEPS: Final = 4
_BF16_STEP: Final = 2.0**-7
# A copy whose requests come alone so many times in a row is not held for others any more, until
# so many have been answered; twice as many each further time.
_LONE_MAX: Final = 16
_QUIET_FIRST: Final = 256
_QUIET_MAX: Final = 1 << 16
_NEVER: Final = sys.maxsize
# A NamedTuple's own ``__new__`` is a Python function: twice the cost.
_new_tuple: Final = tuple.__new__

Inputs = Mapping[str, Array]


class NotByRows(Internal):
    """A joined run answered with tensors that are not one row for each row of the input."""


def fits(metadata: ModelMetadata) -> bool:
    """Whether the first axis of every input and output is free."""
    specs = (*metadata.inputs, *metadata.outputs)
    return bool(metadata.inputs and metadata.outputs) and all(map(_free, specs))


def _free(spec: TensorSpec) -> bool:
    return not spec.any_rank and bool(spec.shape) and spec.shape[0] == -1


def alike(one: InferCall, other: InferCall) -> bool:
    """Whether the two, each joinable, may be joined with each other."""
    if one.head is not other.head and (
        one.head.output_names != other.head.output_names
        or not _equal(one.head.parameters, other.head.parameters)
    ):
        return False
    mine, theirs = one.inputs, other.inputs
    if len(mine) != len(theirs):
        return False
    for name, array in mine.items():
        found = theirs.get(name)
        if found is None or found.shape[1:] != array.shape[1:] or found.dtype != array.dtype:
            return False
    return True


def _equal(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """1, 1.0 and true are equal to Python, and may not be to a model."""
    return mine == theirs and all(type(theirs[name]) is type(mine[name]) for name in mine)


def join(parts: Sequence[Inputs]) -> dict[str, Array]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split(tensors: Sequence[Tensor], counts: Sequence[int], rows: int) -> list[list[Tensor]]:
    """Each request's share, as views; ``rows`` may be more than all counts. Raises NotByRows."""
    answers: list[list[Tensor]] = [[] for _ in counts]
    for name, kind, data in tensors:
        if data.ndim == 0 or data.shape[0] != rows:
            raise NotByRows(
                f"output {name!r} of a joined run of {rows} rows has the shape {list(data.shape)}"
            )
        data = np.ascontiguousarray(data)
        start = 0
        for answer, count in zip(answers, counts, strict=True):
            end = start + count
            answer.append(_new_tuple(Tensor, (name, kind, data[start:end])))
            start = end
    return answers


def agree(alone: Sequence[Tensor], joined: Sequence[Tensor]) -> bool:
    """Whether a request's answers say the same: numbers with fractions within the tolerance that
    other kernels need, everything else exactly."""
    if len(alone) != len(joined):
        return False
    return all(map(_agree, alone, joined))


def _agree(alone: Tensor, joined: Tensor) -> bool:
    mine, theirs = alone.data, joined.data
    if (alone.name, alone.datatype, mine.shape) != (joined.name, joined.datatype, theirs.shape):
        return False
    if mine.dtype != theirs.dtype:
        return False
    step = float(np.finfo(mine.dtype).eps) if mine.dtype.kind == "f" else 0.0
    if alone.datatype == "BF16":
        mine, theirs, step = bf16_to_fp32(mine), bf16_to_fp32(theirs), _BF16_STEP
    if not step:
        return bool(np.array_equal(mine, theirs))
    relative = max(_RELATIVE, _STEPS * step)
    finite = np.abs(mine[np.isfinite(mine)])
    largest = float(finite.max()) if finite.size else 0.0
    return bool(
        np.allclose(
            theirs, mine, rtol=relative, atol=relative * _ABSOLUTE_SHARE * largest, equal_nan=True
        )
    )


def all_equal(parts: Sequence[Inputs]) -> bool:
    """Whether all requests say the same: then rows that look at each other show nothing."""
    first = parts[0]
    return all(
        part[name].shape == array.shape and part[name].tobytes() == array.tobytes()
        if array.dtype.kind != "O"
        else part[name].tolist() == array.tolist()
        for part in parts[1:]
        for name, array in first.items()
    )


def other_row(inputs: Inputs) -> dict[str, Array] | None:
    """A row unlike those of the request, for a trial with equal ones; None for text. Whole numbers
    may be places in a table: they become 0."""
    made: dict[str, Array] = {}
    for name, array in inputs.items():
        row = array[:1]
        match row.dtype.kind:
            case "f":
                made[name] = (row * 2 + 1).astype(row.dtype)
            case "b":
                made[name] = ~row
            case "i" | "u":
                made[name] = np.zeros_like(row) if row.any() else np.ones_like(row)
            case _:
                return None
    return made


class Batching:
    """One copy's. ``fits``: the first axis of all its tensors is free, so that it answers by rows.
    ``on``: what waits together is joined. ``next_trial``: a trial is due when so many requests have
    been answered. ``held``: requests that this turn of the loop (or the time that the owner states)
    collects; ``hold_from``: worth trying when so many are answered."""

    __slots__ = (
        "_crowd",
        "_gather_until_ns",
        "_gathered",
        "_last_ns",
        "_lone",
        "_model",
        "_quiet",
        "_quiet_until",
        "fits",
        "held",
        "held_rows",
        "hold_from",
        "inside",
        "joined_ns",
        "joined_requests",
        "joined_rows",
        "joined_runs",
        "next_trial",
        "on",
        "resuming",
        "standing",
        "terms",
        "timer",
        "trying",
        "waits",
    )

    def __init__(self, metadata: ModelMetadata, model: Wished, *, remote: bool = False) -> None:
        self.fits = not remote and fits(metadata)
        self._model = model
        self._lone = 0  # times in a row that only one request was held
        self._quiet = _QUIET_FIRST
        self._quiet_until = 0
        self._crowd = 0  # requests that the next run may have
        self._gather_until_ns = 0
        self._gathered = 0  # requests that waited when it was last looked
        self._last_ns = 0  # time of the last joined run
        self.terms = Terms(0)
        self.standing = core.begun(self.fits, self.terms)
        self.held: list[Job] = []
        self.held_rows = 0
        self.timer: asyncio.Handle | None = None  # its end lets go of what is held
        self.inside = 0  # requests of this copy in threads
        self.trying = False  # a trial is under way
        self.resuming = False  # its queue is looked at in the next turn
        self.waits = False  # its runs wait for something else than a core
        self.joined_ns: dict[int, int] = {}  # time of a joined run, by the class of its rows
        self.joined_runs = self.joined_requests = self.joined_rows = 0
        self.on = False
        self.next_trial = self.hold_from = _NEVER
        self.use(Wished(), Policy())

    def use(self, record: Wished, policy: Policy) -> None:
        """What the model's record says, and the thresholds, from now on."""
        before, self.terms = self.terms, core.terms(record, self._model, policy)
        self.stand(core.changed(self.standing, self.fits, before, self.terms))

    def stand(self, standing: Standing) -> None:
        self.standing = standing
        self.on = standing.stage is Stage.ON
        due = core.trial_due(standing, self.terms, standing.next_trial)
        self.next_trial = standing.next_trial if due else _NEVER
        wanted_from = 0 if self.on else self.next_trial
        self.hold_from = max(wanted_from, self._quiet_until)

    @property
    def wait_us(self) -> int:
        """How long a request is held for others."""
        return self.terms.max_wait_us if self.on else 0

    def judge(self, trial: Trial | None, requests: int, policy: Policy) -> None:
        """None: a request failed, so that it told nothing."""
        if trial is None:
            self.stand(core.told_nothing(self.standing, requests))
        else:
            self.stand(core.judged(self.standing, trial, requests, policy))

    def blame(self, requests: int) -> None:
        self.stand(core.blamed(self.standing, requests))

    def ran(self, requests: int, rows: int, spent: Times) -> None:
        """A joined run went well."""
        elapsed_ns, self.waits = spent.cpu_ns, core.waits_elsewhere(spent)
        self.joined_runs += 1
        self.joined_requests += requests
        self.joined_rows += rows
        self._last_ns = elapsed_ns
        self.learn(rows, elapsed_ns)
        standing = core.joined(self.standing, rows, self.terms)
        if standing is not self.standing:
            self.stand(standing)

    def ended(
        self, answered: int, waiting: int, since_ns: int, now_ns: int, policy: Policy
    ) -> None:
        """A run has: those who were answered, from ``since_ns`` on, may ask again at once."""
        self._crowd = min(answered + waiting, self.standing.rows)
        self._gathered = waiting
        share = policy.batch_gather_share if self._crowd > 1 else 0.0
        # So many may never have run: as many as there were take no longer.
        next_ns = self.predicted_ns(self._crowd) or self._last_ns
        self._gather_until_ns = now_ns + int((next_ns + now_ns - since_ns) * share)

    def gathering_ns(self, waiting: int, now_ns: int) -> int:
        """How much longer the next run may wait for them; as long as each look finds more of them
        it is worth another, since they are coming."""
        before, self._gathered = self._gathered, waiting
        if waiting >= self._crowd:
            return 0
        return max(self._gather_until_ns - now_ns, int(waiting > before))

    def learn(self, rows: int, elapsed_ns: int) -> None:
        """Moves quickly down and slowly up, as the copy's other times do."""
        size_class = rows.bit_length()
        known = self.joined_ns.get(size_class, 0)
        if known == 0 or elapsed_ns < known:
            self.joined_ns[size_class] = (known + elapsed_ns) >> 1 if known else elapsed_ns
        else:
            self.joined_ns[size_class] = known + ((min(elapsed_ns, known << 2) - known) >> 3) + 1

    def predicted_ns(self, rows: int) -> int:
        """0: unknown."""
        return self.joined_ns.get(rows.bit_length(), 0)

    def came(self, requests: int, answered: int) -> bool:
        """How many were held together; whether it is worth to go on holding them."""
        if requests > 1:
            self._lone, self._quiet = 0, _QUIET_FIRST
            return True
        self._lone += 1
        if self._lone < _LONE_MAX or self.wait_us:
            return True
        self._lone = 0
        self._quiet_until = answered + self._quiet
        self._quiet = min(self._quiet * 2, _QUIET_MAX)
        self.stand(self.standing)
        return False
