"""What must hold at every step of a simulated mesh, and what must be true once it has come to rest.

Safety is checked as things happen, cheaply; the whole books of a cache (``cache_check.validate``)
now and then, in small runs each time. ``Broken`` names the rule and what broke it; the run prints
its seed, and the same seed breaks it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.core.cache_check import validate
from mesh.core.cache_events import Event
from mesh.core.cache_table import BrokenInvariant, Copy
from mesh.core.placement import Placement
from mesh.core.types import CopyState, InstanceState, LoadPriority

if TYPE_CHECKING:
    from bench.sim.instance import SimInstance
    from bench.sim.messages import Flight, Wish
    from bench.sim.router import SimRouter
    from bench.sim.world import World


class Broken(AssertionError):
    """A rule of the mesh does not hold."""


class Checks:
    """One per world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._events = 0
        self._loading: dict[tuple[str, str], int] = {}  # (model, instance) -> miss
        self._began: dict[tuple[str, str], float] = {}
        self._by_miss: dict[int, tuple[str, str]] = {}  # the same the other way round
        self._claims: dict[str, dict[str, LoadPriority]] = {}  # model -> instances that load it

    # ---- safety -----------------------------------------------------------------------------

    def handled(self, instance: SimInstance, event: Event) -> None:
        self._events += 1
        cache = instance.cache
        if (
            cache.used_bytes > cache.config.capacity_bytes
            or self._events % self._world.settings.check_every == 0
        ):
            try:
                validate(cache)
            except BrokenInvariant as broken:
                raise Broken(f"{instance.instance_id} after {event}: {broken}") from broken

    def answers(self, instance: SimInstance, copy: Copy) -> None:
        if copy.state is not CopyState.LOADED or not instance.alive or instance.stopped:
            raise Broken(f"{instance.instance_id} answers with {copy}")

    def asked(
        self, router: SimRouter, model_id: str, instance_id: str, placement: Placement | None
    ) -> None:
        """A router asks for a load; it may only know better than its view by bad luck."""
        if placement is None:
            return  # it joins a load that somebody else placed
        slot = router.view.instances.get(instance_id)
        if slot is None or not slot.ready:
            state = "gone" if slot is None else slot.record.state.value
            raise Broken(f"{model_id} is placed on {instance_id}, which is {state}: {placement}")
        if model_id in slot.copies:
            raise Broken(f"{model_id} is placed on {instance_id}, which has it: {placement}")

    def load_starts(self, instance: SimInstance, flight: Flight) -> None:
        wish = flight.wish
        model_id, miss = wish.model_id, wish.miss
        where = instance.instance_id
        if not instance.alive or instance.stopped or instance.state is not InstanceState.READY:
            raise Broken(f"{model_id} is loaded on {where}, which is {instance.state.value}")
        other = self._by_miss.get(miss)
        if other is not None and self._goes_on(*other):
            raise Broken(f"miss {miss} loads {other} and {model_id} on {where}")
        if (model_id, where) in self._loading:
            raise Broken(f"{model_id} is loaded twice at once on {where}")
        self._loading[(model_id, where)] = miss
        self._began[(model_id, where)] = self._world.engine.time
        self._by_miss[miss] = (model_id, where)

    def _goes_on(self, model_id: str, instance_id: str) -> bool:
        """Whether that load was not given up, and nobody had reason to think so."""
        instance = self._world.instances[instance_id]
        copy = instance.cache.get(model_id)
        began = self._began.get((model_id, instance_id), 0.0)
        silent = instance.stopped or instance.went_on_at > began
        return copy is not None and copy.state is not CopyState.UNLOADING and not silent

    def claimed(self, instance: SimInstance, wish: Wish) -> None:
        """An awaited load is the only one of its model, but for those of instances that have gone
        or did not answer, and while the store was away."""
        there = self._claims.setdefault(wish.model_id, {})
        if wish.priority is LoadPriority.AWAITED:
            for other_id, priority in there.items():
                other = self._world.instances[other_id]
                if priority is not LoadPriority.AWAITED or not other.alive or other.stopped:
                    continue
                self._world.stats.duplicate_loads += 1
                if not self._world.troubles.excuse:
                    raise Broken(
                        f"{wish.model_id} is claimed by {instance.instance_id} while {other_id} "
                        "loads it"
                    )
        there[instance.instance_id] = wish.priority

    def answered(self, instance: SimInstance, wish: Wish) -> None:
        """That load is over, however it ended."""
        there = self._claims.get(wish.model_id, {})
        there.pop(instance.instance_id, None)
        if not there:
            self._claims.pop(wish.model_id, None)

    def load_ends(self, instance: SimInstance, model_id: str) -> None:
        miss = self._loading.pop((model_id, instance.instance_id))
        del self._began[(model_id, instance.instance_id)]
        if self._by_miss.get(miss) == (model_id, instance.instance_id):
            del self._by_miss[miss]

    def died(self, instance: SimInstance) -> None:
        """Its loads end with it."""
        where = instance.instance_id
        for model_id, _ in [key for key in self._loading if key[1] == where]:
            self.load_ends(instance, model_id)
        for flight in instance.flights.values():
            self.answered(instance, flight.wish)

    # ---- liveness ---------------------------------------------------------------------------

    def restless(self) -> str | None:
        """What still goes on; None when all has come to rest."""
        world = self._world
        if world.store.paused:
            return "the store is away"
        alive = {i.instance_id for i in world.instances.values() if i.alive}
        if alive != world.store.instances.keys():
            return "leases of the dead have not expired, or somebody has not joined"
        for router in world.routers:
            if router.open:
                return f"router {router.number}: {len(router.open)} requests wait"
            if router.waiting.flights or router.waiting.calls:
                return f"router {router.number}: loads {list(router.waiting.flights)[:3]}"
            if router.watch.position < world.store.log_end:
                return f"router {router.number} has not seen everything"
        for instance in world.instances.values():
            if not instance.alive:
                continue
            if instance.stopped or instance.state is not InstanceState.READY:
                return f"{instance.instance_id} is stopped, or leaves"
            if instance.flights:
                return f"{instance.instance_id}: loads {list(instance.flights)[:3]}"
            if not instance.publishing.settled:
                return f"{instance.instance_id} has something to write"
            busy = [c for c in instance.cache.copies() if c.state is not CopyState.LOADED]
            if busy:
                return f"{instance.instance_id}: {busy[:3]}"
        return "requests are being answered" if world.engine.ends else None

    def at_rest(self) -> None:
        """Views tell what the store holds, and the store what is in memory."""
        world, store = self._world, self._world.store
        alive = {i.instance_id: i for i in world.instances.values() if i.alive}
        if set(store.instances) != set(alive):
            raise Broken(f"in the store: {sorted(store.instances)}, alive: {sorted(alive)}")
        stored = {
            (model_id, instance_id): record
            for model_id, there in store.copies.items()
            for instance_id, (record, _) in there.items()
        }
        held = {
            (copy.model_id, instance.instance_id)
            for instance in alive.values()
            for copy in instance.cache.copies()
        }
        if set(stored) != held:
            raise Broken(f"copies in store and memory differ: {sorted(set(stored) ^ held)[:5]}")
        for router in world.routers:
            seen = {(c.model_id, c.instance_id): c for c in router.view.all_copies()}
            wrong = [
                k for k in seen.keys() | stored.keys() if not _same(seen.get(k), stored.get(k))
            ]
            if wrong:
                first = min(wrong)
                raise Broken(
                    f"router {router.number} sees {seen.get(first)}, "
                    f"the store has {stored.get(first)} ({len(wrong)} in all)"
                )
            pending = [s for s in router.view.instances.values() if s.pending]
            if pending:
                raise Broken(f"router {router.number} waits for ever: {pending[:3]}")
        for instance in alive.values():
            validate(instance.cache)


def _same(seen: object, stored: object) -> bool:
    return seen == stored
