"""What requests that wait for a model's load do next.

A router runs one load per model, whoever waits; this module decides its steps:
``first_step`` when the first request misses, ``next_step`` after each answer of an instance. The
shell carries a step out (``AskLoad``: count it as pending in the view and call the instance;
``Release``: send the waiting requests there; ``GiveUp``: fail them) and feeds the outcome back.

It must not call anything or keep anything: the state of a load is the frozen ``LoadState`` that
goes in and comes out. Bounds: ``Policy.hops_max`` instances asked for one load, of which at most
``Policy.max_load_failures`` may fail.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final, assert_never

from mesh.core.errors import RETRYABLE, Code, LoadFailed, MeshError, NotFound
from mesh.core.placement import RETRY_SOON_MS, NoPlacement, Placement, place, predict_size_bytes
from mesh.core.policy import Policy
from mesh.core.types import CopyState, FailureRecord, ModelRecord
from mesh.core.view import ClusterView

# ---- what an instance answered ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """The copy is there."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class ClaimedElsewhere:
    """Somebody else's claim or copy was first. ``claimed_by`` is "" when the store had it no
    more."""

    instance_id: str
    claimed_by: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The instance tried, and the model did not load."""

    instance_id: str
    code: Code
    message: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The instance did not try: no room, or it drains."""

    instance_id: str
    message: str


@dataclass(frozen=True, slots=True)
class Unreachable:
    """No answer: connection refused or lost, or it does not know the call."""

    instance_id: str
    message: str


Outcome = Loaded | ClaimedElsewhere | Failed | Rejected | Unreachable


# ---- what to do next --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Release:
    """Send the waiting requests to this instance."""

    instance_id: str
    reason: str  # loaded | copy_appeared


@dataclass(frozen=True, slots=True)
class AskLoad:
    """Call Load there. ``reason``: a placement's, or ``join_claim`` or ``join_loading``, for a
    load that is under way already (then there is no ``placement``)."""

    instance_id: str
    reason: str
    size_bytes: int
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Fail the waiting requests with ``error()``. ``reason`` is a metric label: a NoPlacement's,
    ``unregistered``, or ``hops_used``."""

    reason: str
    detail: str
    code: Code
    retry_after_ms: int | None = None

    def error(self) -> MeshError:
        if self.code is Code.NOT_FOUND:
            return NotFound(self.detail)
        if self.reason == "load_failed":
            return LoadFailed(self.detail, code=self.code, retry_after_ms=self.retry_after_ms)
        return MeshError(self.detail, code=self.code, retry_after_ms=self.retry_after_ms)


Step = Release | AskLoad | GiveUp


@dataclass(frozen=True, slots=True)
class LoadState:
    """One load's history. ``failures`` are what this load saw; the view may lag behind them, so
    the shell should also put each new one into its view (``put_failure``)."""

    model_id: str
    hops: int = 0
    excluded: frozenset[str] = frozenset()
    failures: tuple[FailureRecord, ...] = ()
    last_refusal: str = ""


# Codes of a load that failed because of the world and not because of the model.
_TRANSIENT: Final = RETRYABLE | {Code.DEADLINE_EXCEEDED}


def failure_record(
    model_id: str, instance_id: str, code: Code, message: str, *, now_ms: int, policy: Policy
) -> FailureRecord:
    """The record of a failed load, with the expiry that its kind deserves."""
    lasting_ms = (
        policy.transient_failure_expiry_ms if code in _TRANSIENT else policy.load_failure_expiry_ms
    )
    return FailureRecord(
        model_id=model_id,
        instance_id=instance_id,
        code=code.name,
        message=message,
        failed_at_ms=now_ms,
        expires_at_ms=now_ms + lasting_ms,
    )


def first_step(
    view: ClusterView,
    model_id: str,
    *,
    now_ms: int,
    policy: Policy,
    exclude: Collection[str] = (),
) -> tuple[LoadState, Step]:
    """A request for ``model_id`` found no copy to go to, ``exclude`` are those it has tried."""
    state = LoadState(model_id, excluded=frozenset(exclude))
    return _seek(state, view, now_ms, policy)


def next_step(
    state: LoadState, outcome: Outcome, view: ClusterView, *, now_ms: int, policy: Policy
) -> tuple[LoadState, Step]:
    """An instance that was asked has answered (or has not)."""
    match outcome:
        case Loaded():
            return state, Release(outcome.instance_id, "loaded")
        case ClaimedElsewhere():
            return _after_claim(state, outcome, view, now_ms, policy)
        case Failed():
            record = failure_record(
                state.model_id,
                outcome.instance_id,
                outcome.code,
                outcome.message,
                now_ms=now_ms,
                policy=policy,
            )
            state = replace(
                state,
                excluded=state.excluded | {outcome.instance_id},
                failures=(record, *state.failures),
            )
        case Rejected() | Unreachable():
            state = replace(
                state,
                excluded=state.excluded | {outcome.instance_id},
                last_refusal=f"{outcome.instance_id}: {outcome.message}",
            )
        case _:
            assert_never(outcome)
    return _seek(state, view, now_ms, policy)


def _after_claim(
    state: LoadState, outcome: ClaimedElsewhere, view: ClusterView, now_ms: int, policy: Policy
) -> tuple[LoadState, Step]:
    """Go where the claim is: its Load joins what is under way. Where this load has been in vain
    already, or nobody knows where, look anew: the view catches up with the claim meanwhile."""
    holder = outcome.claimed_by
    refused = f"{outcome.instance_id}: claimed by {holder or 'an instance that has gone'}"
    state = replace(state, last_refusal=refused)
    if not holder or holder in state.excluded or state.hops >= policy.hops_max:
        return _seek(state, view, now_ms, policy)
    model = view.models.get(state.model_id)
    if model is None:
        return state, _unregistered(state.model_id)
    return _ask(state, AskLoad(holder, "join_claim", predict_size_bytes(model, policy)))


def _seek(
    state: LoadState, view: ClusterView, now_ms: int, policy: Policy
) -> tuple[LoadState, Step]:
    """A copy that is there, else one on its way, else a place for a new one."""
    model = view.models.get(state.model_id)
    if model is None:
        return state, _unregistered(state.model_id)
    for instance_id in view.loaded_on(model.model_id):
        if instance_id not in state.excluded:
            return state, Release(instance_id, "copy_appeared")
    if failed := _final_failure(state, view, now_ms, policy):
        return state, failed
    if state.hops >= policy.hops_max:
        return state, _hops_used(state)
    if joined := _loading_on(state, view):
        return _ask(state, AskLoad(joined, "join_loading", predict_size_bytes(model, policy)))
    placed = place(view, model, now_ms=now_ms, policy=policy, exclude=state.excluded)
    if isinstance(placed, NoPlacement):
        return state, _give_up(state, model, placed, now_ms)
    return _ask(state, AskLoad(placed.instance_id, placed.reason, placed.size_bytes, placed))


def _ask(state: LoadState, step: AskLoad) -> tuple[LoadState, Step]:
    return replace(state, hops=state.hops + 1), step


def _loading_on(state: LoadState, view: ClusterView) -> str | None:
    """The READY instance that has been loading the longest and was not tried in vain."""
    loading = [
        (copy.claimed_at_ms, copy.instance_id)
        for copy in view.copies_of(state.model_id)
        if copy.state is CopyState.LOADING
        and copy.instance_id not in state.excluded
        and view.instances[copy.instance_id].ready
    ]
    return min(loading)[1] if loading else None


def _final_failure(
    state: LoadState, view: ClusterView, now_ms: int, policy: Policy
) -> GiveUp | None:
    """Enough instances have failed, counting what the view does not show yet."""
    if not state.failures:
        return None  # ``place`` looks at the view's
    failed_on = {f.instance_id for f in state.failures}
    failed_on |= {f.instance_id for f in view.failures_of(state.model_id, now_ms)}
    if len(failed_on) < policy.max_load_failures:
        return None
    return _failed(state.failures[0], now_ms)


def _give_up(state: LoadState, model: ModelRecord, nowhere: NoPlacement, now_ms: int) -> GiveUp:
    """This load's own failure tells a client more than "no instance is left"."""
    if nowhere.reason in ("all_excluded", "load_failed", "draining") and state.failures:
        return _failed(state.failures[0], now_ms)
    detail = nowhere.detail
    if state.last_refusal and nowhere.reason == "all_excluded":
        detail += f"; last answer: {state.last_refusal}"
    return GiveUp(nowhere.reason, detail, nowhere.code, nowhere.retry_after_ms)


def _failed(record: FailureRecord, now_ms: int) -> GiveUp:
    code = Code[record.code]
    return GiveUp(
        "load_failed",
        f"model {record.model_id!r} failed to load on {record.instance_id}: {record.message}",
        code,
        retry_after_ms=max(1, record.expires_at_ms - now_ms) if code in RETRYABLE else None,
    )


def _hops_used(state: LoadState) -> GiveUp:
    detail = (
        f"model {state.model_id!r} could not be loaded: {state.hops} instances were asked; "
        f"last answer: {state.last_refusal or 'none'}"
    )
    return GiveUp("hops_used", detail, Code.UNAVAILABLE, RETRY_SOON_MS)


def _unregistered(model_id: str) -> GiveUp:
    detail = f"model not found: {model_id!r} was unregistered while it was being loaded"
    return GiveUp("unregistered", detail, Code.NOT_FOUND)
