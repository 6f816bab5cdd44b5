"""What `mesh explain NAME` shows: where a request for NAME would go now, and why.

It runs the functions that serve requests (``route``, ``first_step``) on the same view and adds
what they turned down. It changes nothing. An unknown name is an answer, not an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

from mesh.core.errors import Code
from mesh.core.loads import AskLoad, GiveUp, Release, Wait, first_step
from mesh.core.placement import Candidate, candidates
from mesh.core.policy import Policy
from mesh.core.routing import route
from mesh.core.status import CopyInfo, model_status
from mesh.core.types import ModelState
from mesh.core.view import ClusterView, Unresolved

Outcome = Literal["hit", "join", "load", "wait", "refused", "not_found"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """``outcome``: ``hit`` (a copy answers), ``join`` (waits for a load under way), ``load``
    (a load would start), ``wait`` (there is no place now, but may be one soon), ``refused`` (an
    error) or ``not_found``.

    ``reason`` is the label of the decision; ``detail`` says it to a person. ``candidates`` are
    the instances as a placement sees them, best first, each with its refusal if any, and what is
    held against it (``mesh.core.preference``);
    ``inflight`` are this router's requests in flight on the copies.
    """

    name: str
    outcome: Outcome
    reason: str
    detail: str
    model_id: str = ""
    via: str = ""
    state: ModelState = ModelState.NOT_FOUND
    instance_id: str | None = None
    runner_up: str | None = None
    target_model_id: str | None = None  # while an alias is on its way elsewhere
    code: str = ""  # of the error, when refused or not found, or when the wait is in vain
    copies: tuple[CopyInfo, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    inflight: tuple[tuple[str, int], ...] = ()
    errors: tuple[str, ...] = ()


def explain(
    view: ClusterView,
    name: str,
    *,
    now_ms: int,
    policy: Policy,
    inflight: Mapping[str, int],
    exclude: Collection[str] = (),
    avoid: Collection[str] = (),
    draw: float = 0.0,
) -> Explanation:
    """Decide as a request for ``name`` would be decided now, and tell. ``avoid``: instances that
    seem not to answer."""
    found = view.resolve(name)
    if isinstance(found, Unresolved):
        return Explanation(name, "not_found", found.reason, found.detail, code="NOT_FOUND")
    model_id = found.model_id
    status = model_status(view, model_id, now_ms, name=name)
    outcome, reason, detail, instance_id, runner_up, code = _decide(
        view, model_id, now_ms, policy, inflight, exclude, avoid, draw
    )
    vmodel = view.vmodels.get(name)
    moving = vmodel is not None and vmodel.target_model_id != vmodel.active_model_id
    return Explanation(
        name=name,
        outcome=outcome,
        reason=reason,
        detail=detail,
        model_id=model_id,
        via=found.via,
        state=status.state,
        instance_id=instance_id,
        runner_up=runner_up,
        target_model_id=vmodel.target_model_id if vmodel is not None and moving else None,
        code=code,
        copies=status.copies,
        candidates=candidates(
            view, found.model, now_ms=now_ms, policy=policy, exclude=exclude, avoid=avoid
        ),
        inflight=tuple((i, inflight.get(i, 0)) for i in view.loaded_on(model_id)),
        errors=status.errors,
    )


def _decide(
    view: ClusterView,
    model_id: str,
    now_ms: int,
    policy: Policy,
    inflight: Mapping[str, int],
    exclude: Collection[str],
    avoid: Collection[str],
    draw: float,
) -> tuple[Outcome, str, str, str | None, str | None, str]:
    """(outcome, reason, detail, instance, runner-up, code)"""
    loaded_on = view.loaded_on(model_id)
    answering = [i for i in loaded_on if i not in avoid] or loaded_on
    hit = route(answering, inflight, draw=draw, exclude=exclude)
    if hit is not None:
        busy = inflight.get(hit.instance_id, 0)
        detail = f"loaded on {hit.instance_id}, {busy} requests in flight there"
        return "hit", hit.reason, detail, hit.instance_id, hit.runner_up, ""
    _, step = first_step(view, model_id, now_ms=now_ms, policy=policy, exclude=exclude, avoid=avoid)
    match step:
        case Release():  # not reached: ``route`` would have found it
            return "hit", step.reason, "loaded", step.instance_id, None, ""
        case AskLoad():
            if step.placement is None:
                detail = f"waits for the load under way on {step.instance_id}"
                return "join", step.reason, detail, step.instance_id, None, ""
            placed = step.placement
            return "load", step.reason, placed.detail, step.instance_id, placed.runner_up, ""
        case Wait():
            return "wait", step.reason, step.detail, None, None, Code.UNAVAILABLE.name
        case GiveUp():
            return "refused", step.reason, step.detail, None, None, step.code.name
        case _:
            assert_never(step)
