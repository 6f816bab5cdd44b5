"""Requests for models of runtimes without pods: they wait, and whoever starts pods hears of it."""

from __future__ import annotations

from typing import Any

from mesh.core.policy import Policy
from mesh.registry import DEMAND_PREFIX, decode_demand
from mesh.store.api import StoreUnavailable
from router.demands import REPEAT_MS, Demands

OFFERED = {"mesh-1.x": {"formats": ["onnx"], "labels": []}}


def demands_of(world: Any) -> Demands:
    return Demands(world.store, world.view, policy=world.policy, now_ms=lambda: world.now_ms)


async def written(world: Any, demands: Demands) -> dict[str, tuple[str, int]]:
    await world.until(lambda: not demands._writes)
    items = (await world.store.range(DEMAND_PREFIX)).items
    names = [item.key.removeprefix(DEMAND_PREFIX) for item in items]
    return {n: decode_demand(n, item.value) for n, item in zip(names, items, strict=True)}


async def test_a_request_for_it_waits_and_tells_until_a_pod_has_come(world) -> None:
    world.build(Policy(placement_retry_ms=1, placement_retry_max_ms=1))
    world.view.put_config("runtimes", OFFERED)
    world.model("m")
    call = world.call("m")
    await world.until(lambda: len(world.starved) >= 2)
    assert set(world.starved) == {"m"} and not call.settled
    world.instance("a")
    world.loads.view_changed()
    await world.until(lambda: call.settled)
    assert call.forwards == ["a:1"]


async def test_the_runtime_is_named_once_in_a_while(world) -> None:
    world.view.put_config("runtimes", OFFERED)
    world.model("m")
    world.model("n")
    demands, first_ms = demands_of(world), world.now_ms
    demands.tell("m")
    world.now_ms += REPEAT_MS - 1
    demands.tell("n")
    assert await written(world, demands) == {"mesh-1.x": ("m", first_ms)}
    world.now_ms += 1
    demands.tell("n")
    assert await written(world, demands) == {"mesh-1.x": ("n", first_ms + REPEAT_MS)}


async def test_nothing_is_told_of_a_model_that_no_runtime_takes(world) -> None:
    world.view.put_config("runtimes", OFFERED)
    world.model("other", model_type="sklearn")
    world.model("picky", required_labels=("gpu",))
    demands = demands_of(world)
    for model_id in ("other", "picky", "unknown"):
        demands.tell(model_id)
    assert await written(world, demands) == {}


async def test_a_write_that_failed_is_made_up_for_at_the_next_look(world) -> None:
    world.view.put_config("runtimes", OFFERED)
    world.model("m")
    demands, put = demands_of(world), world.store.put

    async def away(*_args: object, **_kwargs: object) -> int:
        raise StoreUnavailable("etcd is away")

    world.store.put = away
    demands.tell("m")
    assert await written(world, demands) == {}
    world.store.put = put
    demands.tell("m")
    assert await written(world, demands) == {"mesh-1.x": ("m", world.now_ms)}
    await demands.close()
