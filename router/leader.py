"""What the elected leader does: moves aliases whose target has loaded, repairs, loads ahead.

Level-triggered: ``LeaderLoop`` looks at the view when something in it has changed and now and then
without that, asks the pure core (``mesh.core.transitions``, ``repair``, ``proactive``) what to do,
and does it. What it remembers only spares it work: the loads that it asked for (``Orders``), the
models that had changed, which instances were READY. Every write compares, so that two routers that
both believe to lead for a moment do no harm.

A step that fails (store away, instance gone) is logged and left to the next look.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from itertools import islice
from typing import Final, assert_never

from mesh.catalog import Catalog
from mesh.core.errors import MeshError
from mesh.core.minimums import Missing, Shortfall, Tried, missing_copies, missing_in_slices
from mesh.core.policy import Policy
from mesh.core.proactive import has_room, plan_proactive, recent_models
from mesh.core.repair import RepairPlan, plan_repair
from mesh.core.transitions import (
    LoadTarget,
    MarkFailed,
    Switch,
    TransitionAction,
    Wait,
    plan_transitions,
)
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from router.leader_orders import Orders
from router.loads import Loads

log = logging.getLogger(__name__)

# Changes come in bursts: one look answers all of this long.
_GATHER_S: Final = 0.05
# An instance that came or went brings the next sweep forward, but sweeps stay so far apart.
_SWEEP_GAP_S: Final = 0.5
# Proactive loads that are placed in one turn of the loop.
_AHEAD_SLICE: Final = 4


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
        decisions: DecisionLog | None = None,
    ) -> None:
        self._view = view
        self._catalog = catalog
        self._loads = loads
        self._policy = policy
        self._is_leader = is_leader
        self._now_ms = now_ms
        self._orders = Orders(
            view,
            loads,
            policy=policy,
            now_ms=now_ms,
            again=lambda model_id: self.wake(frozenset({model_id})),
            decisions=decisions,
        )
        self._woken = asyncio.Event()
        self._moved_after = ""  # the last alias that the last look at them came to
        self._led = False
        self._swept_at_s = -1e9
        self._sweep_due_s = -1e9
        self._ranking_due_s = -1e9
        self._quiet_until_s = -1e9  # before it no load is begun ahead of requests
        self.sweeps_total = 0
        self.swept_with: frozenset[str] = frozenset()  # instances that the last sweep found READY
        # Models below whose minimum a change may have left; what is too much is the sweep's.
        self._touched: set[str] = set()
        self._filled = 0  # loads that ``fill`` began since the last sweep
        self._ready: frozenset[str] = frozenset()  # instances at the last look
        self._ranked: dict[str, None] = {}  # models to load ahead, by the last walk
        self._absent: dict[str, int] = {}  # missed instances with copies -> since when
        self._plan = RepairPlan(reason="not_synced")

    # ---- what others read -------------------------------------------------------------------

    @property
    def shortfalls(self) -> tuple[Shortfall, ...]:
        """Copies that are wanted and cannot be had, as the last sweep saw; the first of many."""
        return self._plan.shortfalls

    @property
    def copies_lacking(self) -> int:
        """How many those are, all of them."""
        return sum(self._plan.lacking.values())

    def use_policy(self, policy: Policy) -> None:
        """Other thresholds from the next look on, which comes at once."""
        self._policy = policy
        self._orders.use_policy(policy)
        self._sweep_due_s = min(self._sweep_due_s, self._swept_at_s + _SWEEP_GAP_S)
        self._woken.set()

    # ---- the loop ---------------------------------------------------------------------------

    def wake(self, touched: frozenset[str] | None = None) -> None:
        """``touched``: None when the view was read anew as a whole, which the sweep sees to."""
        if touched and self._is_leader() and len(self._touched) < self._policy.repair_batch_max:
            self._touched |= touched & self._view.models_with_minimum()
        self._woken.set()

    async def run(self) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        while True:
            wait_s = self._policy.leader_sweep_ms / 1_000
            if self._led:
                wait_s = min(wait_s, max(0.0, self._sweep_due_s - loop.time()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()
            await asyncio.sleep(_GATHER_S)
            self._woken.clear()
            try:
                await self._look(loop.time())
            except MeshError as error:
                log.warning("leader: %s", error.message)
            except Exception:
                log.exception("leader: a defect; going on")

    async def _look(self, now_s: float) -> None:
        if not self._leads(now_s):
            return
        await self.move_aliases()
        self._see_instances(now_s)
        if now_s >= self._sweep_due_s:
            self._swept_at_s = now_s
            self._sweep_due_s = now_s + self._policy.leader_sweep_ms / 1_000
            await self.repair()
            self.swept_with = self._ready
            self.sweeps_total += 1
        self.fill()
        await self._load_ahead(now_s)

    def _leads(self, now_s: float) -> bool:
        """A new leader knows nothing of what the last one asked for, and begins quietly."""
        leads = self._is_leader()
        if leads != self._led:
            self._led = leads
            self._orders.clear()
            self._ready = frozenset()
            self._absent = {}
            self._plan = RepairPlan(reason="not_synced")
            self._ranking_due_s = self._sweep_due_s = now_s
        return leads

    def _see_instances(self, now_s: float) -> None:
        """One that came is used at once, what one that left had is replaced at once; after none
        was there, awaited loads come first for a while."""
        ready = frozenset(i for i, slot in self._view.instances.items() if slot.ready)
        if ready == self._ready:
            return
        if not self._ready:
            self._quiet_until_s = now_s + self._policy.proactive_quiet_ms / 1_000
        if ready - self._ready:
            self._ranking_due_s = now_s
        self._ready = ready
        self._sweep_due_s = min(self._sweep_due_s, self._swept_at_s + _SWEEP_GAP_S)

    # ---- aliases ----------------------------------------------------------------------------

    async def move_aliases(self) -> None:
        """One look at the aliases that are on their way, or at as many as one look may take."""
        if not self._is_leader():
            return
        plan = plan_transitions(
            self._view, now_ms=self._now_ms(), policy=self._policy, after=self._moved_after
        )
        self._moved_after = plan.after
        if plan.after:
            self._woken.set()
        for action in plan.actions:
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

    def _copies(self, model_id: str | None) -> tuple[str, ...]:
        copies = self._view.copies_of(model_id) if model_id is not None else ()
        return tuple(copy.instance_id for copy in copies)

    # ---- copies that somebody wants -----------------------------------------------------------

    def fill(self) -> None:
        """Begin the loads that the touched models lack: one a model and look, because the first
        one's claim is news that a second one has to know of. No more between two sweeps than a
        sweep may begin, so that a copy that is refused again and again keeps nobody busy."""
        left = set(islice(self._touched, self._policy.repair_batch_max))
        self._touched.clear()
        if not self._is_leader():
            return
        now_ms, most = self._now_ms(), self._policy.repair_loads_max
        tried = self._orders.tried()
        while left and self._filled < most:
            orders, _ = missing_copies(
                self._view,
                now_ms=now_ms,
                policy=self._policy,
                among=left,
                minimums=self._plan.minimums,
                tried=tried,
            )
            if not orders:
                return
            for order in orders[: most - self._filled]:
                self._filled += 1
                self._orders.begin(order)
            left -= {order.model_id for order in orders}

    async def repair(self) -> RepairPlan | None:
        """One sweep; what it decided, None when this router does not lead."""
        if not self._is_leader():
            return None
        now_ms, orders = self._now_ms(), self._orders
        missed = self._view.copies_without_instance()
        self._absent = {i: self._absent.get(i, now_ms) for i in missed}
        missing = await self._missing(now_ms, orders.tried())
        if not self._is_leader():
            return None
        plan = plan_repair(
            self._view,
            now_ms=now_ms,
            policy=self._policy,
            absent_since_ms=self._absent,
            missing=missing,
        )
        self._plan = plan
        orders.tell_shortfalls(plan.shortfalls)
        for order in plan.loads:
            orders.begin(order)
        self._filled = len(plan.loads)
        self._touched.update(plan.crowded)
        for model_id, instance_id in plan.unload:
            orders.note("repair", "orphan_copy", model_id=model_id, instance_id=instance_id,
                        detail="its model is not registered")  # fmt: skip
            self._loads.unload_soon(model_id, (instance_id,))
        for model_id, instance_id in plan.surplus_pins:
            orders.note("unload", "surplus_pin", model_id=model_id, instance_id=instance_id,
                        detail="one pinned copy is enough")  # fmt: skip
            self._loads.unload_soon(model_id, (instance_id,), "surplus_pin")
        for model_id in plan.delete_models:
            if self._is_leader() and await self._catalog.delete_orphan(model_id):
                orders.note("repair", "orphan_model", model_id=model_id,
                            detail="no alias names it any more")  # fmt: skip
        for model_id, instance_id in plan.delete_copies:
            orders.note("repair", "copy_without_instance", model_id=model_id,
                        instance_id=instance_id, detail="its instance has no record")  # fmt: skip
        if plan.delete_copies and self._is_leader():
            await self._catalog.delete_copies(plan.delete_copies)
        if plan.delete_failures and self._is_leader():
            await self._catalog.delete_failures(plan.delete_failures, now_ms)
        if plan.delete_last_used and self._is_leader():
            await self._catalog.delete_last_used(plan.delete_last_used)
        return plan

    async def _missing(self, now_ms: int, tried: Tried) -> Missing:
        """Found in slices: this router serves requests too."""
        slices = missing_in_slices(self._view, now_ms=now_ms, policy=self._policy, tried=tried)
        while True:
            try:
                next(slices)
            except StopIteration as ended:
                missing: Missing = ended.value
                return missing
            await asyncio.sleep(0)

    # ---- ahead of requests --------------------------------------------------------------------

    async def _load_ahead(self, now_s: float) -> None:
        """Fill free memory with what was used last: ranked now and then, begun as loads end."""
        view, policy, orders = self._view, self._policy, self._orders
        if now_s < self._quiet_until_s or not has_room(view, policy):
            return
        if now_s >= self._ranking_due_s:
            self._ranking_due_s = now_s + policy.proactive_sweep_ms / 1_000
            recent = recent_models(
                view, now_ms=self._now_ms(), policy=policy, passed_over=orders.passed_over()
            )
            self._ranked = dict.fromkeys(recent)
        for _ in range(policy.proactive_loads_max):
            if not self._ranked or not self._is_leader():
                return
            chosen = plan_proactive(
                view,
                now_ms=self._now_ms(),
                policy=policy,
                under_way=orders.ahead(),
                ranked=self._ranked,
                most=_AHEAD_SLICE,
            )
            if not chosen:
                if not orders.ahead():
                    self._ranked = {}  # what is left fits nowhere: not to be looked at for ever
                return
            for order in chosen:
                del self._ranked[order.model_id]
                orders.begin(order)
            await asyncio.sleep(0)
