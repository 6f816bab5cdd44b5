"""What the elected leader does: moves aliases whose target has loaded, and repairs.

Level-triggered: ``LeaderLoop`` looks at the view when something in it has changed and now and then
without that, asks the pure core (``mesh.core.transitions``, ``mesh.core.repair``) what to do, and
does it. Nothing is remembered between two looks but the loads under way and, so that a minimum of
copies need not wait for the next sweep, which models had changed. Every write compares, so
that two routers that both believe to lead for a moment do no harm.

A step that fails (store away, instance gone) is logged and left to the next look.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from itertools import islice
from typing import Final, assert_never

from mesh.core.errors import MeshError
from mesh.core.policy import Policy
from mesh.core.repair import LoadOrder, RepairPlan, missing_copies, plan_repair
from mesh.core.transitions import (
    LoadTarget,
    MarkFailed,
    Switch,
    TransitionAction,
    Wait,
    plan_transitions,
)
from mesh.core.view import ClusterView
from router.catalog import Catalog
from router.loads import Loads

log = logging.getLogger(__name__)

# Changes come in bursts: one look answers all of this long.
_GATHER_S: Final = 0.05


class LeaderLoop:
    """Run ``run()`` as a task; ``wake(touched)`` at each change of the view with the models that it
    touched. ``is_leader`` is asked before each act, ``now_ms`` is the wall clock's reading."""

    def __init__(
        self,
        view: ClusterView,
        catalog: Catalog,
        loads: Loads,
        *,
        policy: Policy,
        is_leader: Callable[[], bool],
        now_ms: Callable[[], int],
    ) -> None:
        self._view = view
        self._catalog = catalog
        self._loads = loads
        self._policy = policy
        self._is_leader = is_leader
        self._now_ms = now_ms
        self._woken = asyncio.Event()
        self._swept_at_s = -1e9
        self.sweeps_total = 0
        # Models below whose minimum a change may have left; what is too much is the sweep's.
        self._touched: set[str] = set()
        self._filled = 0  # loads that ``fill`` began since the last sweep

    def wake(self, touched: frozenset[str] | None = None) -> None:
        """``touched``: None when the view was read anew as a whole, which the sweep sees to."""
        if touched and self._is_leader() and len(self._touched) < self._policy.repair_batch_max:
            self._touched |= touched & self._view.models_with_minimum()
        self._woken.set()

    async def run(self) -> None:
        """For ever."""
        sweep_s = self._policy.leader_sweep_ms / 1_000
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(sweep_s):
                    await self._woken.wait()
            await asyncio.sleep(_GATHER_S)
            self._woken.clear()
            try:
                await self.move_aliases()
                if self._is_leader() and loop.time() - self._swept_at_s >= sweep_s:
                    self._swept_at_s = loop.time()
                    self._filled = 0
                    await self.repair()
                    self.sweeps_total += 1
                self.fill()
            except MeshError as error:
                log.warning("leader: %s", error.message)
            except Exception:
                log.exception("leader: a defect; going on")

    async def move_aliases(self) -> None:
        """One look at the aliases that are on their way."""
        if not self._is_leader():
            return
        actions = plan_transitions(self._view, now_ms=self._now_ms(), policy=self._policy)
        for action in actions:
            if not self._is_leader():
                return
            await self._transit(action)

    async def _transit(self, action: TransitionAction) -> None:
        match action:
            case Wait():
                return
            case LoadTarget():
                log.info("alias %s: load %s on %s (%s)", action.name, action.model_id,
                         action.placement.instance_id, action.reason)  # fmt: skip
                # Through the shared loads: a failed instance is followed by the next one.
                with contextlib.suppress(MeshError):
                    self._loads.begin(action.model_id)
            case Switch():
                gone = action.delete_model_id
                old_copies = self._copies(gone)
                if await self._catalog.replace_alias(action.old, action.new, gone):
                    log.info("alias %s: now %s instead of %s (%s)", action.new.name,
                             action.new.active_model_id, action.old.active_model_id,
                             action.reason)  # fmt: skip
                    if gone is not None:
                        self._loads.unload_soon(gone, old_copies)
            case MarkFailed():
                if await self._catalog.replace_alias(action.old, action.new):
                    log.warning("alias %s: stays at %s: %s", action.new.name,
                                action.new.active_model_id, action.new.failed)  # fmt: skip
            case _:
                assert_never(action)

    def fill(self) -> None:
        """Begin the loads that the touched models lack: one a model and look, because the first
        one's claim is news that a second one has to know of. No more between two sweeps than a
        sweep may begin, so that a copy that is refused again and again keeps nobody busy."""
        left = set(islice(self._touched, self._policy.repair_batch_max))
        self._touched.clear()
        if not self._is_leader():
            return
        now_ms = self._now_ms()
        while left and self._filled < self._policy.repair_loads_max:
            orders, _ = missing_copies(self._view, now_ms=now_ms, policy=self._policy, among=left)
            if not orders:
                return
            for order in orders[: self._policy.repair_loads_max - self._filled]:
                self._filled += 1
                self._begin(order)
            left -= {order.model_id for order in orders}

    def _begin(self, order: LoadOrder) -> None:
        self._loads.ask_soon(order.model_id, order.placement, priority=order.priority)

    async def repair(self) -> RepairPlan | None:
        """One sweep; what it decided, None when this router does not lead."""
        if not self._is_leader():
            return None
        now_ms = self._now_ms()
        plan = plan_repair(self._view, now_ms=now_ms, policy=self._policy)
        for order in plan.loads:
            self._begin(order)
        for model_id, instance_id in plan.unload:
            self._loads.unload_soon(model_id, (instance_id,))
        for model_id in plan.delete_models:
            if self._is_leader() and await self._catalog.delete_orphan(model_id):
                log.info("model %s deleted: no alias names it", model_id)
        if plan.delete_failures and self._is_leader():
            await self._catalog.delete_failures(plan.delete_failures, now_ms)
        if plan.delete_last_used and self._is_leader():
            await self._catalog.delete_last_used(plan.delete_last_used)
        for short in plan.shortfalls:
            log.debug("model %s lacks %d copies: %s", short.model_id, short.missing, short.detail)
        return plan

    def _copies(self, model_id: str | None) -> tuple[str, ...]:
        if model_id is None:
            return ()
        return tuple(copy.instance_id for copy in self._view.copies_of(model_id))
