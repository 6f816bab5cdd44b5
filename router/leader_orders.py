"""What the leader has asked instances for and not seen the end of.

Begins its loads through ``router.loads`` and notes each decision. Remembers, bounded in time, who
was asked for what: an instance that does not take a model is passed over for a sweep, and for up to
``Policy.transient_failure_expiry_ms`` when that goes on; a model that was not loaded ahead of
requests for some sweeps. What became of a load is read from the view alone, so that nothing is
lost when an answer is; but that somebody's claim was first is no refusal, and only an answer says
so: then the model is looked at again at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Final

from mesh.core.loads import Answer, ClaimedElsewhere
from mesh.core.minimums import LoadOrder, Shortfall
from mesh.core.policy import Policy
from mesh.core.types import CopyState, LoadPriority
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from router.loads import Loads

log = logging.getLogger(__name__)

# Sweeps of proactive loading for which a model is left alone that was not loaded when it was asked.
_PASSED_OVER_SWEEPS: Final = 10
_KINDS: Final = {"pinned": "pin", "min_copies": "minimum", "recently_used": "proactive"}


class Orders:
    """See the module's docstring. ``now_ms`` is the wall clock's reading; ``again`` is called with
    a model to be looked at again."""

    def __init__(
        self,
        view: ClusterView,
        loads: Loads,
        *,
        policy: Policy,
        now_ms: Callable[[], int],
        again: Callable[[str], None],
        decisions: DecisionLog | None,
    ) -> None:
        self._view = view
        self._loads = loads
        self._policy = policy
        self._now_ms = now_ms
        self._again = again
        self._decisions = decisions
        # model id -> instance id -> (when it was asked last, how often in a row)
        self._asked: dict[str, dict[str, tuple[int, int]]] = {}
        self._ahead: set[str] = set()  # proactive loads under way
        self._passed_over: dict[str, int] = {}  # model id -> when its proactive load had failed
        self._told: frozenset[tuple[str, str]] = frozenset()  # shortfalls that were noted

    def use_policy(self, policy: Policy) -> None:
        self._policy = policy

    def clear(self) -> None:
        """This router does not lead (any more): whoever does sees the view."""
        self._asked.clear()
        self._ahead.clear()
        self._passed_over.clear()
        self._told = frozenset()

    def begin(self, order: LoadOrder) -> None:
        """Ask for it, in the background."""
        model_id, placement = order.model_id, order.placement
        if order.priority is LoadPriority.PROACTIVE:
            self._ahead.add(model_id)
        else:
            asked = self._asked.setdefault(model_id, {})
            _, times = asked.get(placement.instance_id, (0, 0))
            asked[placement.instance_id] = (self._now_ms(), times + 1)
        self.note(
            _KINDS[order.reason],
            order.reason,
            model_id=model_id,
            instance_id=placement.instance_id,
            runner_up=placement.runner_up or "",
            detail=placement.detail,
        )
        revision = self._view.revision
        self._loads.ask_soon(
            model_id,
            placement,
            priority=order.priority,
            reason=order.reason,
            pin=order.pin,
            ended=lambda answer: self._ended(model_id, answer, revision),
        )

    def _ended(self, model_id: str, answer: Answer, revision: int) -> None:
        """Something changed under the model's copies after ``revision``, at which it was asked. The
        view either knows that by now, or hears of it and wakes the leader then."""
        if not isinstance(answer, ClaimedElsewhere) or model_id not in self._asked:
            return
        self._asked[model_id].pop(answer.instance_id, None)
        if self._view.revision > revision:
            self._again(model_id)

    def tried(self) -> Mapping[str, Collection[str]]:
        """Model id -> instances that were asked for it lately: for one sweep when they were asked
        once, for longer each time in a row."""
        now_ms, most_ms = self._now_ms(), self._policy.transient_failure_expiry_ms
        tried: dict[str, list[str]] = {}
        for model_id in list(self._asked):
            asked = self._asked[model_id]
            for instance_id, (at_ms, times) in list(asked.items()):
                wait_ms = min(most_ms, self._policy.leader_sweep_ms << min(times - 1, 16))
                if now_ms - at_ms < wait_ms:
                    tried.setdefault(model_id, []).append(instance_id)
                elif now_ms - at_ms > 2 * most_ms:
                    del asked[instance_id]
            if not asked:
                del self._asked[model_id]
        return tried

    def ahead(self) -> Collection[str]:
        """Models whose proactive load is under way."""
        view = self._view
        for model_id in list(self._ahead):
            copies = view.copies_of(model_id)
            if view.pending_of(model_id) or any(c.state is CopyState.LOADING for c in copies):
                continue
            self._ahead.discard(model_id)
            if not copies:
                self._passed_over[model_id] = self._now_ms()
        return self._ahead

    def passed_over(self) -> Collection[str]:
        """Models that are not loaded ahead of requests again for a while."""
        since_ms = self._now_ms() - _PASSED_OVER_SWEEPS * self._policy.proactive_sweep_ms
        self._passed_over = {m: at for m, at in self._passed_over.items() if at > since_ms}
        return self._passed_over

    def tell_shortfalls(self, shortfalls: Collection[Shortfall]) -> None:
        """Note those that are new."""
        now = frozenset((short.model_id, short.reason) for short in shortfalls)
        for short in shortfalls:
            if (short.model_id, short.reason) not in self._told:
                detail = f"{short.missing} missing: {short.detail}"
                self.note("minimum", short.reason, model_id=short.model_id, detail=detail)
        self._told = now

    def note(
        self,
        kind: str,
        reason: str,
        *,
        model_id: str = "",
        instance_id: str = "",
        runner_up: str = "",
        detail: str = "",
    ) -> None:
        """A decision, where they are kept."""
        if self._decisions is None:
            log.info("%s %s on %s: %s (%s)", kind, model_id, instance_id, reason, detail)
            return
        self._decisions.note(
            kind,
            reason,
            model_id=model_id,
            instance_id=instance_id,
            runner_up=runner_up,
            detail=detail,
        )
