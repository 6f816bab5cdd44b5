"""What requests that wait for a model's load do next.

A router runs one load per model, whoever waits; this module decides its steps:
``first_step`` when the first request misses, ``next_step`` after each answer of an instance. The
shell carries a step out (``AskLoad``: count it as pending in the view and call the instance;
``Wait``: for a change of the view, or so long; ``Release``: send the waiting requests there;
``GiveUp``: fail them) and feeds the outcome back.

When there is no place right now but may be one soon (no instance is ready, all memory is busy,
nobody answers), the load waits and looks again, with what stood in the way forgotten; only who
still seems not to answer is not asked again, nor where the model itself failed.

It must not call anything or keep anything: the state of a load is the frozen ``LoadState`` that
goes in and comes out. Bounds: ``Policy.hops_max`` instances asked between two waits,
``Policy.placement_wait_ms`` of waiting in all (``runtime_start_wait_ms`` for pods from zero), and
at most ``Policy.max_load_failures`` loads that fail.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final, assert_never

from mesh.core.demand import predict_size_bytes
from mesh.core.errors import RETRYABLE, Code, LoadFailed, MeshError, NotFound, Unavailable
from mesh.core.nowhere import RUNTIME_STARTING
from mesh.core.placement import RETRY_SOON_MS, NoPlacement, Placement, place
from mesh.core.policy import Policy
from mesh.core.types import CopyState, FailureRecord
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


@dataclass(frozen=True, slots=True)
class Waited:
    """A ``Wait`` is over: the view has changed, or its time has. ``asked_at_ms`` is when the first
    of the requests that still wait came; the bound is each request's own."""

    asked_at_ms: int = 0


# What a Load call comes to; and what ``next_step`` takes.
Answer = Loaded | ClaimedElsewhere | Failed | Rejected | Unreachable
Outcome = Answer | Waited


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
class Wait:
    """No place right now, but there may be one: come back with ``Waited`` when the view has
    changed, and after ``retry_ms`` in any case. Who does not want to wait takes ``error()``.
    ``reason`` is a NoPlacement's or ``hops_used``."""

    reason: str
    detail: str
    retry_ms: int

    def error(self) -> MeshError:
        return Unavailable(self.detail, retry_after_ms=RETRY_SOON_MS)


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Fail the waiting requests with ``error()``. ``reason`` is a metric label: a NoPlacement's,
    ``unregistered``, or ``hops_used``. ``waited``: the first of them has waited for a place as long
    as it may, and those who came later may go on (``Waited`` with the time of the next one)."""

    reason: str
    detail: str
    code: Code
    retry_after_ms: int | None = None
    waited: bool = False

    def error(self) -> MeshError:
        if self.code is Code.NOT_FOUND:
            return NotFound(self.detail)
        if self.reason == "load_failed":
            return LoadFailed(self.detail, code=self.code, retry_after_ms=self.retry_after_ms)
        return MeshError(self.detail, code=self.code, retry_after_ms=self.retry_after_ms)


Step = Release | AskLoad | Wait | GiveUp


@dataclass(frozen=True, slots=True)
class LoadState:
    """One load's history. ``failures`` are what this load saw; the view may lag behind them, so
    the shell should also put each new one into its view (``put_failure``). ``hops`` and
    ``excluded`` are of the time since the last wait, but that who failed stays excluded, and who
    does not answer as long as that is so."""

    model_id: str
    hops: int = 0
    excluded: frozenset[str] = frozenset()
    failures: tuple[FailureRecord, ...] = ()
    last_refusal: str = ""
    waits: int = 0
    waiting_since_ms: int | None = None

    @property
    def failed_on(self) -> frozenset[str]:
        return frozenset(failure.instance_id for failure in self.failures)


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
    avoid: Collection[str] = (),
) -> tuple[LoadState, Step]:
    """A request for ``model_id`` found no copy to go to; ``exclude`` are those it has tried.
    ``avoid``: instances that seem not to answer, for when nobody else is left."""
    state = LoadState(model_id, excluded=frozenset(exclude))
    return _seek(state, view, now_ms, policy, avoid)


def next_step(
    state: LoadState,
    outcome: Outcome,
    view: ClusterView,
    *,
    now_ms: int,
    policy: Policy,
    avoid: Collection[str] = (),
) -> tuple[LoadState, Step]:
    """An instance that was asked has answered (or has not), or a wait is over."""
    match outcome:
        case Loaded():
            return state, Release(outcome.instance_id, "loaded")
        case ClaimedElsewhere():
            return _after_claim(state, outcome, view, now_ms, policy, avoid)
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
        case Waited():
            since_ms = max(state.waiting_since_ms or 0, outcome.asked_at_ms)
            # Who seems not to answer even now would be asked in vain, at each look.
            still = state.failed_on | state.excluded.intersection(avoid)
            state = replace(state, hops=0, excluded=still, waiting_since_ms=since_ms)
        case _:
            assert_never(outcome)
    return _seek(state, view, now_ms, policy, avoid)


def _after_claim(
    state: LoadState,
    outcome: ClaimedElsewhere,
    view: ClusterView,
    now_ms: int,
    policy: Policy,
    avoid: Collection[str],
) -> tuple[LoadState, Step]:
    """Go where the claim is: its Load joins what is under way. Where this load has been in vain
    already or nobody answers, or nobody knows where, look anew: the view catches up meanwhile."""
    holder = outcome.claimed_by
    refused = f"{outcome.instance_id}: claimed by {holder or 'an instance that has gone'}"
    state = replace(state, last_refusal=refused)
    in_vain = holder in state.excluded or holder in avoid
    if not holder or in_vain or state.hops >= policy.hops_max:
        return _seek(state, view, now_ms, policy, avoid)
    model = view.models.get(state.model_id)
    if model is None:
        return state, _unregistered(state.model_id)
    return _ask(state, AskLoad(holder, "join_claim", predict_size_bytes(model, policy)))


def _seek(
    state: LoadState, view: ClusterView, now_ms: int, policy: Policy, avoid: Collection[str]
) -> tuple[LoadState, Step]:
    """A copy that is there, else one on its way, else a place for a new one; and all three
    anywhere rather than on an instance to be avoided."""
    model = view.models.get(state.model_id)
    if model is None:
        return state, _unregistered(state.model_id)
    loaded = [i for i in view.loaded_on(model.model_id) if i not in state.excluded]
    for instance_id in loaded:
        if instance_id not in avoid:
            return state, Release(instance_id, "copy_appeared")
    if failed := _final_failure(state, view, now_ms, policy):
        return state, failed
    size_bytes = predict_size_bytes(model, policy)
    loading = _loading_on(state, view)
    joined = next((i for i in loading if i not in avoid), None)
    if joined and state.hops < policy.hops_max:
        return _ask(state, AskLoad(joined, "join_loading", size_bytes))
    placed = place(view, model, now_ms=now_ms, policy=policy, exclude=state.excluded, avoid=avoid)
    found = isinstance(placed, Placement) and placed.instance_id not in avoid
    if loaded and not (found and state.hops < policy.hops_max):
        return state, Release(loaded[0], "copy_appeared")
    if state.hops >= policy.hops_max:
        return _wait_or_give_up(state, _hops_used(state), now_ms, policy)
    if loading and not found:
        return _ask(state, AskLoad(loading[0], "join_loading", size_bytes))
    if isinstance(placed, Placement):
        return _ask(state, AskLoad(placed.instance_id, placed.reason, placed.size_bytes, placed))
    if placed.retryable and placed.reason != "load_failed" and not _only_failures_left(state):
        return _wait_or_give_up(state, _nowhere(state, placed, now_ms), now_ms, policy)
    return state, _nowhere(state, placed, now_ms)


def _only_failures_left(state: LoadState) -> bool:
    """The model failed here and there, and nobody else stood in the way: waiting helps nothing."""
    return bool(state.failures) and state.excluded <= state.failed_on


def patience_ms(reason: str, policy: Policy) -> int:
    """How long a request waits for a place in all, by what it lacks."""
    if reason == RUNTIME_STARTING:
        return max(policy.placement_wait_ms, policy.runtime_start_wait_ms)
    return policy.placement_wait_ms


def _wait_or_give_up(
    state: LoadState, nowhere: GiveUp, now_ms: int, policy: Policy
) -> tuple[LoadState, Step]:
    since_ms = now_ms if state.waiting_since_ms is None else state.waiting_since_ms
    left_ms = since_ms + patience_ms(nowhere.reason, policy) - now_ms
    if left_ms <= 0:
        return state, replace(nowhere, waited=state.waiting_since_ms is not None)
    # Doubled as long as that says anything: the shift is bounded, the number of waits is not.
    doubled_ms = policy.placement_retry_ms << min(state.waits, 16)
    retry_ms = max(1, min(doubled_ms, policy.placement_retry_max_ms, left_ms))
    state = replace(state, waits=state.waits + 1, waiting_since_ms=since_ms)
    return state, Wait(nowhere.reason, nowhere.detail, retry_ms)


def _ask(state: LoadState, step: AskLoad) -> tuple[LoadState, Step]:
    return replace(state, hops=state.hops + 1), step


def _loading_on(state: LoadState, view: ClusterView) -> list[str]:
    """READY instances that load it and were not tried in vain, the one first that began first."""
    return [
        instance_id
        for _, instance_id in sorted(
            (copy.claimed_at_ms, copy.instance_id)
            for copy in view.copies_of(state.model_id)
            if copy.state is CopyState.LOADING
            and copy.instance_id not in state.excluded
            and view.instances[copy.instance_id].ready
        )
    ]


def _final_failure(
    state: LoadState, view: ClusterView, now_ms: int, policy: Policy
) -> GiveUp | None:
    """Enough instances have failed, counting what the view does not show yet."""
    if not state.failures:
        return None  # ``place`` looks at the view's
    failed_on = set(state.failed_on)
    failed_on |= {f.instance_id for f in view.failures_of(state.model_id, now_ms)}
    if len(failed_on) < policy.max_load_failures:
        return None
    return _failed(state.failures[0], now_ms)


def _nowhere(state: LoadState, nowhere: NoPlacement, now_ms: int) -> GiveUp:
    """This load's own failure tells a client more than "no instance is left"."""
    if nowhere.reason in ("all_excluded", "load_failed", "draining") and state.failures:
        return _failed(state.failures[0], now_ms)
    detail = nowhere.detail
    if state.last_refusal and nowhere.retryable and nowhere.reason != "load_failed":
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
