"""Wherever the controller is killed between two actions, the next one comes to the same end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.manifest import OWNER_OF, applied_uid, parse_resource
from mesh.reconciler.plan import FINALIZER, is_ours
from tests.reconciler.plan_world import ISVC, KSP, ONNX, Cut, World, isvc, ksp

Step = Callable[[World], object]


def applied(*resources: dict[str, object]) -> Step:
    return lambda world: [world.apply(resource) for resource in resources]


def reconcile(world: World) -> None:
    world.reconcile()


def loaded(world: World) -> None:
    world.load("n")


def failing(world: World) -> None:
    world.load("n", fails=True)


def deleted(world: World) -> None:
    world.delete(ISVC, "n")


def forced_off(world: World) -> None:
    world.force_off(ISVC, "n")


def without_runtimes(world: World) -> None:
    world.offers.clear()


def unmarked(world: World) -> None:
    """The annotation that makes it ours goes."""
    resource = isvc()
    del resource["metadata"]["annotations"]
    world.apply(resource)


SERVED = (applied(isvc()), reconcile, loaded, reconcile)
CHANGED = applied(isvc(uri="s3://b/2"))

SCENARIOS: dict[str, tuple[Step, ...]] = {
    "a new one": (applied(isvc()),),
    "with warnings": (applied(isvc(oops=1)),),
    "a Predictor": (applied(ksp()),),
    "loaded": (applied(isvc()), reconcile, loaded),
    "failed": (applied(isvc()), reconcile, failing),
    "changed": (*SERVED, CHANGED),
    "changed and failed": (*SERVED, CHANGED, reconcile, failing),
    "changed and back": (*SERVED, CHANGED, reconcile, applied(isvc())),
    "made wrong": (*SERVED, applied(isvc(uri="nowhere"))),
    "deleted": (*SERVED, deleted),
    "deleted while it switches": (*SERVED, CHANGED, reconcile, deleted),
    "deleted and made anew": (*SERVED, deleted, reconcile, applied(isvc())),
    "deleted when it was wrong": (*SERVED, applied(isvc(uri="nowhere")), reconcile, deleted),
    "not ours any more": (*SERVED, unmarked),
    "forced away": (*SERVED, deleted, forced_off),
    "forced off and alive": (*SERVED, forced_off),
    "forced away and made anew": (*SERVED, deleted, forced_off, applied(isvc())),
    "forced off and not ours": (*SERVED, forced_off, unmarked),
    "no runtime": (without_runtimes, applied(isvc())),
    "its runtime goes": (*SERVED, without_runtimes),
    "two of a name": (applied(isvc(), ksp()),),
    "the other takes over": (applied(isvc(), ksp()), reconcile, deleted),
    "many": (applied(*(isvc(f"n{at}") for at in range(3)), ksp("m"), isvc("w", uri="x")),),
}


def settled(steps: tuple[Step, ...]) -> World:
    world = World()
    for step in steps:
        step(world)
    return world


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_every_cut_leads_to_the_same_end(steps: tuple[Step, ...]) -> None:
    whole = settled(steps)
    actions = whole.reconcile()
    assert actions > 0
    for at in range(actions):
        world = settled(steps)
        with pytest.raises(Cut):
            world.reconcile(cut_before=at)
        world.reconcile()
        assert world.picture() == whole.picture(), f"cut before action {at}"
        check(world)


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_what_is_settled_asks_for_nothing(steps: tuple[Step, ...]) -> None:
    world = settled(steps)
    world.reconcile()
    world.now_ms += 3_600_000
    writes = world.writes
    assert world.reconcile() == 0
    assert world.writes == writes


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_while_the_registry_is_away_nothing_is_lost(steps: tuple[Step, ...]) -> None:
    """``World`` fails a plan that writes to it; its return leads to where it would have led."""
    straight, world = settled(steps), settled(steps)
    world.reachable = False
    world.reconcile()
    assert all(FINALIZER in one["metadata"].get("finalizers", ()) for one in _leaving(world))
    world.reachable = True
    world.reconcile()
    straight.reconcile()
    told = {event for event in world.events if event[1] != "RegistryAway"}
    assert world.picture()[:3] == straight.picture()[:3]  # type: ignore[index]
    assert told == set(straight.events)


def _leaving(world: World) -> list[dict[str, dict[str, object]]]:
    return [one for one in world.resources.values() if "deletionTimestamp" in one["metadata"]]


def check(world: World) -> None:
    """Nothing leaked, nothing doubled, nothing forgotten."""
    named: set[str] = set()
    for name, alias in world.view.vmodels.items():
        named |= {alias.active_model_id, alias.target_model_id}
        if not applied_uid(alias.manifest):
            continue
        (kind,) = (kind for kind, owner in OWNER_OF.items() if owner == alias.owner)
        resource = world.resources[kind, name]
        assert FINALIZER in resource["metadata"]["finalizers"]
        assert is_ours(resource, take_all=world.take_all)
    assert named >= {m for m, record in world.view.models.items() if record.auto_delete}
    for (kind, name), resource in world.resources.items():
        finalizers = resource["metadata"].get("finalizers", [])
        assert finalizers.count(FINALIZER) == len(finalizers) <= 1
        assert "deletionTimestamp" not in resource["metadata"]
        if not is_ours(resource, take_all=world.take_all):
            assert not finalizers
            continue
        status = resource["status"]
        transition = status.get("modelStatus", status)["transitionStatus"]
        if transition != "InvalidSpec":
            wanted = parse_resource(resource).model.model_id
            assert world.alias(name).target_model_id == wanted
            assert world.alias(name).owner == OWNER_OF[kind]
            assert applied_uid(world.alias(name).manifest) == resource["metadata"]["uid"]


NAMES = st.sampled_from(["a", "b"])
KINDS = st.sampled_from([ISVC, KSP])
URIS = st.sampled_from(["s3://b/1", "s3://b/2", "nowhere"])
HAPPENINGS = st.one_of(
    st.tuples(st.just("apply"), KINDS, NAMES, URIS, st.booleans()),
    st.tuples(st.just("delete"), KINDS, NAMES),
    st.tuples(st.just("force_off"), KINDS, NAMES),
    st.tuples(st.just("load"), NAMES, st.booleans()),
    st.tuples(st.just("evict"), NAMES),
    st.tuples(st.just("reach"), st.booleans()),
    st.tuples(st.just("runtimes"), st.booleans()),
    st.tuples(st.just("take_all"), st.booleans()),
    st.tuples(st.just("by_hand"), NAMES),
    st.tuples(st.just("reconcile"), st.none() | st.integers(0, 6)),
)


def happen(world: World, what: tuple[object, ...]) -> None:
    match what:
        case ("apply", str(kind), str(name), str(uri), bool(marked)):
            resource = isvc(name, uri) if kind == ISVC else ksp(name, uri)
            if not marked:
                resource["metadata"].pop("annotations", None)
            old = world.resources.get((kind, name))
            if old is None or "deletionTimestamp" not in old["metadata"]:
                world.apply(resource)
        case ("delete", str(kind), str(name)):
            world.delete(kind, name)
        case ("force_off", str(kind), str(name)):
            world.force_off(kind, name)
        case ("load", str(name), bool(fails)):
            world.load(name, fails=fails)
        case ("evict", str(name)):
            world.evict(name)
        case ("reach", bool(reachable)):
            world.reachable = reachable
        case ("runtimes", bool(there)):
            world.offers = [ONNX] if there else []
        case ("take_all", bool(take_all)):
            world.take_all = take_all
        case ("by_hand", str(name)):
            alias = world.view.vmodels.get(name)
            if world.reachable and (alias is None or alias.owner == "isvc"):
                world.register(parse_resource(isvc(name, "s3://b/hand")))
        case ("reconcile", at):
            assert at is None or isinstance(at, int)
            try:
                world.reconcile(cut_before=at)
            except Cut:
                return
        case _:
            raise AssertionError(what)


@given(st.lists(HAPPENINGS, max_size=25))
def test_whatever_happens_it_settles(happenings: list[tuple[object, ...]]) -> None:
    world = World()
    for what in happenings:
        happen(world, what)
    world.reachable = True
    world.reconcile()
    check(world)
    assert world.reconcile() == 0
