"""A whole mesh in virtual time: makes the parts, feeds them a workload, waits until all rests."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from bench.sim.checks import Broken, Checks
from bench.sim.faults import Fault, schedule
from bench.sim.instance import SimInstance
from bench.sim.neighbours import Neighbours
from bench.sim.router import SimRouter
from bench.sim.tables import Outcome, Stats, imbalance, quantile
from bench.sim.workloads import Workload, model_name
from bench.sim.world import Costs, Settings, World
from mesh.core.cache_table import Copy
from mesh.core.types import CopyState, ModelRecord

# The caches are warm after this share of the requests (as ``bench.sim.one_cache`` has it).
WARM_SHARE: Final = 0.25


class Cluster:
    """``run`` once."""

    def __init__(self, settings: Settings, workload: Workload) -> None:
        self.workload = workload
        self.settings = settings
        self.ids = [model_name(number) for number in range(workload.model_count)]
        sizes = dict(zip(self.ids, workload.size_bytes.tolist(), strict=True))
        loads = dict(zip(self.ids, workload.load_ms.tolist(), strict=True))
        self.world = World(settings, Costs(sizes, loads))
        self.world.stats = Stats()
        self.world.checks = Checks(self.world)
        self.world.numbers = {model_id: number for number, model_id in enumerate(self.ids)}
        self._lives = 0
        self.world.store.write(self._record(n, sizes) for n in range(len(self.ids)))
        self.places: list[str] = [""] * settings.instances  # who lives there now
        self.world.neighbours = Neighbours(self.world)
        for place in range(settings.instances):
            self._start_instance(place)
        self.world.engine.run_until(1_000.0)  # they have joined
        for number in range(settings.routers):
            self.world.routers.append(SimRouter(self.world, number))
        self.world.routers[0].lead()

    def _record(self, number: int, sizes: Mapping[str, int]) -> ModelRecord:
        settings, model_id = self.settings, self.ids[number]
        known = number < len(self.ids) * settings.size_known_share
        return ModelRecord(
            model_id,
            "onnx",
            size_bytes_measured=sizes[model_id] if known else None,
            min_copies=2 if number < settings.wanting else 0,
            pinned=settings.wanting <= number < settings.wanting + settings.pinned,
        )

    # ---- who is there -----------------------------------------------------------------------

    def _start_instance(self, place: int) -> None:
        instance_id = f"i{place}.{self._lives}"
        self._lives += 1
        zone = f"zone-{place % self.settings.zones}" if self.settings.zones > 1 else ""
        instance = SimInstance(self.world, instance_id, self.settings.capacity_bytes, zone, place)
        self.world.instances[instance_id] = instance
        self.places[place] = instance_id
        instance.start()

    def _living(self, place: int) -> SimInstance | None:
        instance = self.world.instances[self.places[place % len(self.places)]]
        return instance if instance.alive else None

    def crash(self, place: int, *, restarts: bool) -> None:
        instance = self._living(place)
        if instance is None:
            return
        self.world.troubles.excuse = True
        instance.crash()
        self.world.checks.died(instance)
        for router in self.world.routers:
            router.died(instance.instance_id)
        if restarts:
            self._restart(place)

    def _restart(self, place: int) -> None:
        engine = self.world.engine
        engine.after(self.settings.restart_ms, self._start_instance, place % len(self.places))

    def stop(self, place: int, for_ms: float) -> None:
        instance = self._living(place)
        if instance is None or instance.stopped:
            return
        self.world.troubles.excuse = True
        instance.stop()
        for router in self.world.routers:
            router.stopped(instance.instance_id)
        self.world.engine.after(for_ms, self._go_on, instance)

    def _go_on(self, instance: SimInstance) -> None:
        instance.go_on()
        for router in self.world.routers:
            router.back(instance)

    def drain(self, place: int, timeout_ms: float, *, restarts: bool) -> None:
        """Its successor comes first, as a deployment has it."""
        instance = self._living(place)
        if instance is None:
            return
        if restarts:
            self._start_instance(place % len(self.places))
        instance.deliver(instance.drain, timeout_ms)

    def crash_router(self, number: int) -> None:
        """Its clients ask the others at once; another one comes in its place."""
        routers = self.world.routers
        gone = routers[number % len(routers)]
        if len(routers) < 2:
            return
        routers.remove(gone)
        lost = gone.crash()
        for request in lost:
            self.world.stats.retries["router"] += 1
            routers[0].request(request.model_id, request.began)
        if gone.leads:
            routers[0].lead()
        self.world.engine.after(self.settings.restart_ms, self._start_router, gone.number)

    def _start_router(self, number: int) -> None:
        if self.world.store.paused:  # it waits until the store answers
            self.world.engine.after(500.0, self._start_router, number)
            return
        self.world.routers.append(SimRouter(self.world, number))

    # ---- a run ------------------------------------------------------------------------------

    def run(self, placement: str = "production", faults: Iterable[Fault] = ()) -> Outcome:
        with _calm_collector():
            return self._run(placement, faults)

    def _run(self, placement: str, faults: Iterable[Fault]) -> Outcome:
        began, began_cpu = time.perf_counter(), time.process_time()
        start = self.world.engine.time
        schedule(self, faults)
        stats, warm_from = self.world.stats, int(self.workload.request_count * WARM_SHARE)
        for chunk in self.workload.requests(self.settings.seed):
            times, numbers = (chunk.at_ms + start).tolist(), chunk.model.tolist()
            cold = min(max(0, warm_from - stats.requests), len(times))
            if cold:
                self._requests(times[:cold], numbers[:cold])
                stats.cold_requests, stats.cold_hits = stats.requests, stats.hits
            self._requests(times[cold:], numbers[cold:])
        minutes = (self.world.engine.time - start) / 60_000.0
        self.settle()
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        return self._outcome(placement, minutes, wall_s, cpu_s)

    def _requests(self, times: Iterable[float], numbers: Iterable[int]) -> None:
        """Plain hits here and now, everything else by the routers."""
        world = self.world
        engine, stats, ids, instances = world.engine, world.stats, self.ids, world.instances
        run_until, ends = engine.run_until, engine.ends
        service_ms = self.settings.service_ms
        loaded = CopyState.LOADED
        ended = self._hit_ended
        routers = world.routers
        turn = stats.requests
        hits = 0
        for at, number in zip(times, numbers, strict=True):
            if engine.next_time <= at:
                run_until(at)
            router = routers[turn % len(routers)]
            turn += 1
            router.uses.counts[number] += 1
            model_id = ids[number]
            on = router.view.loaded_on(model_id)
            if len(on) == 1:
                instance = instances[on[0]]
                copy = instance.serving.get(model_id)
                if copy is not None and copy.use.in_flight < 64:
                    if copy.state is not loaded:
                        world.checks.answers(instance, copy)
                    use = copy.use
                    use.in_flight += 1
                    use.uses += 1
                    use.last_used_at_ms = engine.now_ms
                    instance.requests += 1
                    ends.append((at + service_ms, ended, (instance, copy, router)))
                    hits += 1
                    continue
            run_until(at)
            router.request(model_id)
        stats.requests = turn
        stats.hits += hits

    def _hit_ended(self, instance: SimInstance, copy: Copy, router: SimRouter) -> None:
        if not instance.alive:  # it has died with the request inside
            self.world.stats.hits -= 1
            router.lost(copy.model_id, instance.instance_id)
            return
        use = copy.use
        use.in_flight -= 1
        if not use.in_flight and instance.cache.awaiting_idle:
            use.in_flight += 1
            instance.request_ended(copy)

    def settle(self) -> None:
        """Until nothing goes on any more. Raises Broken when that takes for ever."""
        engine, checks = self.world.engine, self.world.checks
        last = engine.time + self.settings.settle_max_ms
        while (why := checks.restless()) is not None:
            if engine.time >= last:
                raise Broken(f"not at rest {self.settings.settle_max_ms:.0f} ms later: {why}")
            engine.run_until(engine.time + 500.0)
        checks.at_rest()

    def _loads_by_place(self) -> list[int]:
        """Of all who have lived there."""
        loads = [0] * len(self.places)
        for instance in self.world.instances.values():
            loads[instance.place] += instance.loads
        return loads

    def _outcome(self, placement: str, minutes: float, wall_s: float, cpu_s: float) -> Outcome:
        stats = self.world.stats
        waited = stats.waited_ms
        self.world.trace.note("end", stats.requests, stats.hits, stats.loads, stats.evictions)
        return Outcome(
            workload=self.workload.name,
            placement=placement,
            requests=stats.requests,
            hit_ratio=stats.hits / max(1, stats.requests),
            cold_p50_ms=quantile(waited, 0.5),
            cold_p99_ms=quantile(waited, 0.99),
            loads_per_min=stats.loads / max(minutes, 1e-9),
            bytes_pulled=stats.bytes_pulled,
            evictions=stats.evictions,
            imbalance=imbalance(self._loads_by_place()),
            failed=stats.failed_requests,
            digest=self.world.trace.digest,
            wall_s=wall_s,
            cpu_s=cpu_s,
            warm_hit_ratio=(stats.hits - stats.cold_hits)
            / max(1, stats.requests - stats.cold_requests),
            scaled_up=stats.scaled_up,
        )


@contextlib.contextmanager
def _calm_collector() -> Iterator[None]:
    """A hundred thousand records live until the end: looking for cycles among them again and again
    took a fifth of a run."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
