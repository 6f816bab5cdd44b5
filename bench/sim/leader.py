"""The elected leader's loop (``router.leader``) on the virtual clock: repair and loading ahead.

Which router leads is not simulated: the first one that lives. What it asked for and has not seen
the end of is kept by the production ``router.leader_orders.Orders``.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from bench.sim.store import Gone
from mesh.core.errors import Unavailable
from mesh.core.proactive import has_room, plan_proactive, recent_models
from mesh.core.repair import missing_copies, plan_repair
from mesh.core.types import FailureRecord
from router.leader_orders import Orders

if TYPE_CHECKING:
    from bench.sim.router import SimRouter

# Production gathers changes for 50 ms: five times as many looks at the same, and all in vain.
GATHER_MS: Final = 250.0
SWEEP_GAP_MS: Final = 500.0


class SimLeader:
    """One for each router that comes to lead."""

    def __init__(self, router: SimRouter) -> None:
        self.router = router
        self._world = router.world
        self._policy = router.world.policy
        self._orders = Orders(
            router.view,
            router.waiting,  # type: ignore[arg-type]  # it has ``ask_soon``, all that is used
            policy=self._policy,
            now_ms=lambda: self._world.engine.now_ms,
            again=lambda model_id: self.wake({model_id}),
            decisions=None,
        )
        now = self._world.engine.time
        self._swept_at = -1e9
        self._sweep_due = self._ranking_due = now
        self._quiet_until = -1e9
        self._touched: set[str] = set()
        self._filled = 0
        self._ready: frozenset[str] = frozenset()
        self._ranked: tuple[str, ...] = ()
        self._armed = False
        self.lacking = 0
        self._beat()

    def wake(self, touched: set[str]) -> None:
        if len(self._touched) < self._policy.repair_batch_max:
            self._touched |= touched & self.router.view.models_with_minimum()
        self._arm()

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            self._world.engine.after(GATHER_MS, self._look)

    def _beat(self) -> None:
        if self.router.alive:
            self._arm()
            self._world.engine.after(self._policy.leader_sweep_ms, self._beat)

    def _look(self) -> None:
        self._armed = False
        if not self.router.alive:
            return
        now = self._world.engine.time
        self._see_instances(now)
        if now >= self._sweep_due:
            self._swept_at, self._sweep_due = now, now + self._policy.leader_sweep_ms
            self._filled = 0
            self._repair()
        self._fill()
        self._load_ahead(now)

    def _see_instances(self, now: float) -> None:
        view = self.router.view
        ready = frozenset(i for i, slot in view.instances.items() if slot.ready)
        if ready == self._ready:
            return
        if not self._ready:
            self._quiet_until = now + self._policy.proactive_quiet_ms
        if ready - self._ready:
            self._ranking_due = now
        self._ready = ready
        self._sweep_due = min(self._sweep_due, self._swept_at + SWEEP_GAP_MS)

    def _repair(self) -> None:
        world, orders = self._world, self._orders
        plan = plan_repair(
            self.router.view,
            now_ms=world.engine.now_ms,
            policy=self._policy,
            tried=orders.tried(),
        )
        self.lacking = sum(plan.lacking.values())
        for order in plan.loads:
            orders.begin(order)
        for model_id, instance_id in (*plan.unload, *plan.surplus_pins):
            world.neighbours.unload_on(instance_id, model_id)
        if plan.delete_failures:
            world.engine.after(world.settings.store_ms, self._forget, plan.delete_failures)

    def _forget(self, failures: tuple[tuple[str, str], ...]) -> None:
        store, now_ms = self._world.store, self._world.engine.now_ms
        over = [
            Gone(FailureRecord, *key)
            for key in failures
            if key in store.failures and store.failures[key].expires_at_ms <= now_ms
        ]
        try:
            if over:
                store.write(over)
        except Unavailable:
            return  # the next sweep sees to it

    def _fill(self) -> None:
        left = set(islice(sorted(self._touched), self._policy.repair_batch_max))
        self._touched.clear()
        most = self._policy.repair_loads_max
        tried = self._orders.tried()
        while left and self._filled < most:
            orders, _ = missing_copies(
                self.router.view,
                now_ms=self._world.engine.now_ms,
                policy=self._policy,
                among=left,
                tried=tried,
            )
            if not orders:
                return
            for order in orders[: most - self._filled]:
                self._filled += 1
                self._orders.begin(order)
            left -= {order.model_id for order in orders}

    def _load_ahead(self, now: float) -> None:
        view, policy, orders = self.router.view, self._policy, self._orders
        now_ms = self._world.engine.now_ms
        if now < self._quiet_until or not has_room(view, policy):
            return
        if now >= self._ranking_due:
            self._ranking_due = now + policy.proactive_sweep_ms
            self._ranked = recent_models(
                view, now_ms=now_ms, policy=policy, passed_over=orders.passed_over()
            )
        if not self._ranked:
            return
        for order in plan_proactive(
            view, now_ms=now_ms, policy=policy, under_way=orders.ahead(), ranked=self._ranked
        ):
            self._world.stats.proactive += 1
            orders.begin(order)
