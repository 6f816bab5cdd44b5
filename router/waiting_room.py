"""Calls that wait for something better than what there is: a load, or an instance that is back.

Two kinds. Those that wait for a load (``enter``) are in ``router.loads``' queue and bounded there;
they are known here so that an instance that comes back with a copy of their model is used at once.
Those that are parked (``park``) wait for such an instance, or because what was loaded for them was
gone again each time; they look again after a while, twice as long each time, and at once when an
instance is back.

It decides nothing: ``again`` routes a call that need not wait any more. Bounds: parked calls by
``Policy.max_waiting_total`` (RESOURCE_EXHAUSTED past it), each by its deadline, which its carrier
keeps, or without one by load time-out plus queue time-out (then UNAVAILABLE).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from time import monotonic
from typing import Final

from mesh.core.errors import MeshError, ResourceExhausted, Unavailable
from mesh.core.policy import Policy
from mesh.core.view import ClusterView
from mesh.internal_calls import load_timeout_ms
from router.journey import Journey

FULL_RETRY_MS: Final = 1_000
# Calls that one look sends on their way: each may cost a placement, up to half a millisecond. Those
# that were parked first go first; the others go at the next look.
LOOK_SLICE: Final = 64


class WaitingRoom:
    def __init__(self, view: ClusterView, policy: Policy, again: Callable[[Journey], None]) -> None:
        self._view = view
        self._policy = policy
        self._again = again
        self._waiting: dict[Journey, None] = {}  # for a load
        self._parked: dict[Journey, None] = {}

    def use_policy(self, policy: Policy) -> None:
        self._policy = policy

    def __len__(self) -> int:
        """Calls that are parked."""
        return len(self._parked)

    def enter(self, journey: Journey) -> None:
        """It waits for a load (``journey.waiter``)."""
        self._waiting[journey] = None

    def leave(self, journey: Journey) -> None:
        """It waits no more, for whatever reason."""
        self._waiting.pop(journey, None)
        self._parked.pop(journey, None)

    def park(self, journey: Journey) -> MeshError | None:
        """Look again after a while; or why not."""
        policy = self._policy
        now_s = monotonic()
        if len(self._parked) >= policy.max_waiting_total:
            return ResourceExhausted(
                f"{len(self._parked)} requests wait for instances that do not answer: "
                "try again later",
                retry_after_ms=FULL_RETRY_MS,
            )
        call = journey.call
        model = self._view.models.get(journey.model_id)
        waits_ms = load_timeout_ms(model, policy)
        if call.deadline_s == math.inf and now_s - call.started_s > waits_ms / 1_000:
            return Unavailable(
                f"model {call.model_name!r} could not be reached within {waits_ms} ms: try again",
                retry_after_ms=FULL_RETRY_MS,
            )
        pause_ms = min(
            policy.placement_retry_ms << min(journey.parks, 16), policy.placement_retry_max_ms
        )
        journey.parks += 1
        journey.parked_until_s = now_s + pause_ms / 1_000
        self._parked[journey] = None
        return None

    def look(self, now_s: float) -> None:
        """Send those on their way that have rested; to be called every 100 ms or so."""
        due = (journey for journey in self._parked if journey.parked_until_s <= now_s)
        for journey in tuple(islice(due, LOOK_SLICE)):
            self._go_on(journey)

    def wake(self, instance_id: str) -> None:
        """An instance is back: whoever waits for a model that it has need not wait."""
        loaded_on = self._view.loaded_on
        waiting = [*self._parked, *self._waiting]
        for journey in [j for j in waiting if instance_id in loaded_on(j.model_id)]:
            self._go_on(journey)

    def _go_on(self, journey: Journey) -> None:
        if journey in self._parked or journey in self._waiting:  # one may end another
            self.leave(journey)
            self._again(journey)
