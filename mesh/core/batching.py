"""Whether requests for one copy that wait together are run together. Pure.

Nothing is joined before a trial has shown, on requests as they came, that the joined run answers
as the runs one by one do and costs less; trials are repeated, rarely. Who states batching for a
model (KServe's ``batcher``, Triton's ``dynamic_batching``) has it without a trial. What is measured
and what is run is none of this module's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from mesh.core.policy import Policy

# Below this share of processor time in the whole, a model waits for something else (a device, a
# socket): then real time is what counts.
_WAITS_SHARE: Final = 0.2
# What joining costs a request beside its run: it is held, grouped and answered with others.
_JOINING_NS: Final = 2_000
# A trial that did not pay is repeated after so many requests; four times as many each further time.
_AGAIN_FIRST: Final = 256
_AGAIN_MAX: Final = 1 << 20
_AGAIN_FACTOR: Final = 4
# One slow run may be a lost time slice; so many in a row are the model.
_SLOW_TRIALS: Final = 2
# Joined runs that failed where each of their requests alone did not, in a row.
_BLAMES_MAX: Final = 3
# Rows of the first joined runs: the memory of a run grows with them, and nobody knows how fast.
_ROWS_FIRST: Final = 8


class Stage(Enum):
    UNFIT = "UNFIT"  # its axes or its owner rule it out; left when the terms change
    UNTRIED = "UNTRIED"  # left by the first trial
    ON = "ON"  # left when trials do not pay any more, or when joining is at fault
    OFF = "OFF"  # did not pay; tried again after some requests
    REFUSED = "REFUSED"  # answers differ, or joined runs fail: for good, for this copy


class Reason(Enum):
    """Why a copy's batching stands where it does: a label of decisions, a field of `describe`."""

    FIXED_AXIS = "fixed_axis"  # an input's or an output's first axis is not free
    SWITCHED_OFF = "switched_off"  # at most one row at once: by the model's owner or the policy
    NOT_TRIED = "not_tried"  # no two requests have waited together yet
    STATED = "stated"  # the model's owner asks for it
    FASTER = "faster"
    NOT_FASTER = "not_faster"
    NOT_TELLING = "not_telling"  # equal requests of a kind that none can be made up of
    ANSWERS_DIFFER = "answers_differ"
    JOINED_FAILS = "joined_fails"


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for one copy. ``max_rows`` 0 or 1: never. ``max_wait_us``: a request may be held
    so long for others. ``stated``: the model's owner asks for batching."""

    max_rows: int
    max_wait_us: int = 0
    stated: bool = False


@dataclass(frozen=True, slots=True)
class Wished:
    """What somebody says of a model; None where silent."""

    max_rows: int | None = None
    max_wait_us: int | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """Of running the same requests once: real and processor time."""

    wall_ns: int
    cpu_ns: int


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of running ``requests`` one by one and joined. ``same``: the answers agree; None:
    they do, but would have anyway. ``joined`` None: the joined run failed, and nobody alone did."""

    requests: int
    apart: Times
    joined: Times | None
    same: bool | None = True


@dataclass(frozen=True, slots=True)
class Standing:
    """One copy's batching. ``next_trial``: requests answered by which the next one is due."""

    stage: Stage
    reason: Reason
    next_trial: int = 0
    again: int = _AGAIN_FIRST
    slow_trials: int = 0  # in a row, while ON
    blames: int = 0  # in a row
    rows: int = _ROWS_FIRST  # joined at most for now
    gain: float = 0.0  # time of one request alone : its share of a joined run, at the last trial


def terms(record: Wished, model: Wished, policy: Policy) -> Terms:
    """The resource comes before the model's own file, and that before the policy."""
    rows = record.max_rows if record.max_rows is not None else model.max_rows
    wait_us = record.max_wait_us if record.max_wait_us is not None else model.max_wait_us
    # A model's file that only says how many rows it takes does not ask that requests be joined.
    stated = bool(record.max_rows) or wait_us is not None
    return Terms(
        policy.batch_rows_max if rows is None else rows,
        policy.batch_wait_max_us if wait_us is None else wait_us,
        stated,
    )


def waits_elsewhere(spent: Times) -> bool:
    """For a device or a socket, rather than for a core."""
    return spent.cpu_ns < _WAITS_SHARE * spent.wall_ns


def beside(running: int, inside: int, waiting: int, cores: int, *, waits: bool) -> bool:
    """Whether the ``waiting`` requests start a joined run beside the ``running`` ones, which have
    ``inside`` in them. Fewer runs with more rows in each cost less; beyond one a core, runs that
    compute only take the core from each other."""
    if not running:
        return True
    return waiting >= inside and (waits or running < cores)


def begun(fits: bool, wanted: Terms) -> Standing:
    """``fits``: the first axis of every input and output is free."""
    if not fits:
        return Standing(Stage.UNFIT, Reason.FIXED_AXIS)
    if wanted.max_rows < 2:
        return Standing(Stage.UNFIT, Reason.SWITCHED_OFF)
    rows = min(_ROWS_FIRST, wanted.max_rows)
    if wanted.stated:
        return Standing(Stage.ON, Reason.STATED, rows=rows)
    return Standing(Stage.UNTRIED, Reason.NOT_TRIED, rows=rows)


def trial_due(standing: Standing, wanted: Terms, requests: int) -> bool:
    """``requests``: answered so far."""
    if standing.stage in (Stage.UNFIT, Stage.REFUSED) or wanted.stated:
        return False
    return requests >= standing.next_trial


def judged(standing: Standing, trial: Trial, requests: int, policy: Policy) -> Standing:
    """After a trial; ``requests`` answered so far."""
    if trial.joined is None:
        return blamed(standing, requests)
    if trial.same is False:
        return replace(standing, stage=Stage.REFUSED, reason=Reason.ANSWERS_DIFFER)
    gain = _gain(trial)
    if trial.same is None:
        # Nothing was learned of the answers: as it was, and not so soon again.
        reason = standing.reason if standing.stage is Stage.ON else Reason.NOT_TELLING
        return _again(replace(standing, reason=reason, gain=gain), requests)
    if gain * (1.0 - policy.batch_gain_min_share) >= 1.0:
        if standing.stage is Stage.ON:
            return _again(replace(standing, gain=gain, slow_trials=0), requests)
        return Standing(
            Stage.ON,
            Reason.FASTER,
            next_trial=requests + policy.batch_retrial_requests,
            again=policy.batch_retrial_requests,
            rows=standing.rows,
            gain=gain,
        )
    if standing.stage is Stage.ON and standing.slow_trials + 1 < _SLOW_TRIALS:
        return replace(
            standing, gain=gain, slow_trials=standing.slow_trials + 1, next_trial=requests
        )
    again = _AGAIN_FIRST if standing.stage is Stage.ON else standing.again
    off = replace(
        standing, stage=Stage.OFF, reason=Reason.NOT_FASTER, gain=gain, again=again, slow_trials=0
    )
    return _again(off, requests)


def told_nothing(standing: Standing, requests: int) -> Standing:
    """A trial in which a request failed by its own fault."""
    return _again(standing, requests)


def joined(standing: Standing, rows: int, wanted: Terms) -> Standing:
    """After a joined run that went well: more rows next time, where these were all that it might
    have."""
    if standing.blames == 0 and (rows * 2 <= standing.rows or standing.rows >= wanted.max_rows):
        return standing
    more = standing.rows * 2 if rows * 2 > standing.rows else standing.rows
    return replace(standing, blames=0, rows=min(more, max(wanted.max_rows, 2)))


def blamed(standing: Standing, requests: int) -> Standing:
    """A joined run failed, and each of its requests alone did not: half the rows, and after some
    of these nothing is joined any more. Memory may have been short for a moment."""
    blames = standing.blames + 1
    if blames >= _BLAMES_MAX:
        return replace(standing, stage=Stage.REFUSED, reason=Reason.JOINED_FAILS, blames=blames)
    fewer = replace(standing, blames=blames, rows=max(2, standing.rows // 2))
    return fewer if standing.stage is Stage.ON else _again(fewer, requests)


def changed(standing: Standing, fits: bool, before: Terms, wanted: Terms) -> Standing:
    """Other terms. What was found out stays, but for what the owner now states."""
    if before == wanted:
        return standing
    fresh = begun(fits, wanted)
    if fresh.stage is Stage.UNFIT or standing.stage is Stage.UNFIT or before.stated:
        return fresh
    if wanted.stated:
        return fresh
    return replace(standing, rows=min(standing.rows, wanted.max_rows))


def _again(standing: Standing, requests: int) -> Standing:
    """The next trial after ``again`` requests, and after more of them from then on."""
    return replace(
        standing,
        next_trial=requests + standing.again,
        again=min(standing.again * _AGAIN_FACTOR, _AGAIN_MAX),
    )


def _gain(trial: Trial) -> float:
    """How many times as long a request takes alone as joined, by the time that tells."""
    assert trial.joined is not None
    apart, together = trial.apart, trial.joined
    waits = waits_elsewhere(apart)
    alone_ns, joined_ns = (
        (apart.wall_ns, together.wall_ns) if waits else (apart.cpu_ns, together.cpu_ns)
    )
    return alone_ns / max(1, joined_ns + trial.requests * _JOINING_NS)
