"""What is planned for one service, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh.core.types import ModelRecord, VModelRecord
from mesh.manifest import parse_resource
from mesh.reconciler.plan import (
    FINALIZER,
    AddFinalizer,
    Emit,
    Register,
    RemoveFinalizer,
    Retry,
    StorageSecret,
    Unregister,
    WriteStatus,
    is_ours,
    plan_orphans,
    plan_service,
)
from mesh.runtime_selection import RuntimeOffer
from mesh.serving_runtime import ModelFormat, ServingRuntime
from tests.reconciler.plan_world import ISVC, KSP, ONNX, World, isvc, ksp


def served(*, load: bool = True) -> World:
    world = World()
    world.apply(isvc())
    world.reconcile()
    if load:
        world.load("n")
        world.reconcile()
    return world


def kinds(plan: tuple[object, ...]) -> list[str]:
    return [type(action).__name__ for action in plan]


def condition(world: World, kind: str = "Ready") -> dict[str, Any]:
    (found,) = (one for one in world.status()["conditions"] if one["type"] == kind)
    return dict(found)


# ---- the way of a service -----------------------------------------------------------------------


def test_the_finalizer_comes_before_the_name_and_the_status_after() -> None:
    world = World()
    world.apply(isvc())
    first = world.plan(ISVC, "n")
    assert kinds(first) == ["AddFinalizer", "Register"]
    for action in first:
        world.carry_out(ISVC, "n", action)
    assert kinds(world.plan(ISVC, "n")) == ["WriteStatus"]


def test_a_service_is_ready_when_its_model_has_been_loaded() -> None:
    world = served(load=False)
    assert (condition(world)["status"], world.status()["modelStatus"]["states"]) == (
        "False",
        {"activeModelState": "Pending", "targetModelState": "Pending"},
    )
    world.load("n")
    world.reconcile()
    assert condition(world)["status"] == "True"
    world.evict("n")
    world.reconcile()
    assert condition(world)["status"] == "True"
    assert world.status()["modelStatus"]["states"]["activeModelState"] == "Standby"


def test_a_changed_spec_is_a_new_target_and_the_old_model_serves() -> None:
    world = served()
    old = world.alias().active_model_id
    world.apply(isvc(uri="s3://b/2"))
    world.reconcile()
    assert world.alias().active_model_id == old != world.alias().target_model_id
    assert world.status()["modelStatus"]["transitionStatus"] == "InProgress"
    assert world.status()["observedGeneration"] == 2
    world.load("n", fails=True)
    world.reconcile()
    model_status = world.status()["modelStatus"]
    assert model_status["transitionStatus"] == "BlockedByFailedLoad"
    assert model_status["lastFailureInfo"]["message"] == "bad"
    assert condition(world)["status"] == "True"
    assert ("Warning", "ModelLoadFailed", "bad") in world.events


def test_changed_scaling_is_written_and_loads_nothing() -> None:
    world = served()
    resource = isvc()
    resource["spec"]["predictor"]["minReplicas"] = 3
    world.apply(resource)
    assert kinds(world.plan(ISVC, "n")) == ["Register"]
    world.reconcile()
    assert world.alias().active_model_id == world.alias().target_model_id
    assert world.view.models[world.alias().active_model_id].min_copies == 3


def test_the_api_servers_own_bookkeeping_is_no_change() -> None:
    world = served()
    metadata = world.resources[ISVC, "n"]["metadata"]
    metadata |= {"resourceVersion": "9", "managedFields": [{}], "selfLink": "x"}
    metadata["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] = "{}"
    assert world.plan(ISVC, "n") == ()


def test_what_the_mesh_learns_of_a_model_is_no_change() -> None:
    world = served()
    model = world.view.models[world.alias().active_model_id]
    world.view.put_model(replace(model, size_bytes_measured=7, last_used_at_ms=9, created_at_ms=1))
    assert world.plan(ISVC, "n") == ()


def test_deletion_unregisters_and_then_lets_go() -> None:
    world = served()
    model_id = world.alias().active_model_id
    world.delete(ISVC, "n")
    assert world.plan(ISVC, "n") == (Unregister("n", "isvc", (model_id,)), RemoveFinalizer())
    world.reconcile()
    assert (world.resources, world.view.vmodels, world.view.models) == ({}, {}, {})


def test_what_went_without_a_word_is_unregistered() -> None:
    world = served()
    world.delete(ISVC, "n")
    world.force_off(ISVC, "n")
    assert kinds(plan_service(None, world.observed(ISVC, "n"))) == ["Unregister"]
    assert plan_service(None, world.observed(KSP, "n")) == ()


# ---- the registry is away -----------------------------------------------------------------------


def test_a_new_service_says_that_the_registry_is_away() -> None:
    world = World(reachable=False)
    world.apply(isvc())
    assert kinds(world.plan(ISVC, "n")) == ["WriteStatus", "Retry"]
    world.reconcile()
    assert condition(world)["reason"] == "RegistryAway"
    assert kinds(world.plan(ISVC, "n")) == ["Retry"]


def test_a_service_that_serves_keeps_its_status() -> None:
    world = served()
    world.reachable = False
    world.apply(isvc(uri="s3://b/2"))
    assert kinds(world.plan(ISVC, "n")) == ["Retry"]


def test_the_finalizer_stays_while_the_registry_is_away() -> None:
    world = served()
    world.delete(ISVC, "n")
    world.reachable = False
    told, again = world.plan(ISVC, "n")
    assert isinstance(told, Emit)
    assert told.reason == "RegistryAway"
    assert isinstance(again, Retry)
    world.reconcile()
    assert world.resources[ISVC, "n"]["metadata"]["finalizers"] == [FINALIZER]


# ---- what cannot be served ----------------------------------------------------------------------


def offered(**fields: Any) -> list[RuntimeOffer]:
    runtime = ServingRuntime("rt", (ModelFormat("onnx", "", True),), multi_model=True)
    return [RuntimeOffer(replace(runtime, **fields))]


@pytest.mark.parametrize(
    ("resource", "offers", "reason", "said"),
    [
        (
            isvc(uri="x"),
            [ONNX],
            "InvalidPredictorSpec",
            "spec.predictor.model.storageUri: expected",
        ),
        (isvc(), [], "NoSupportingRuntime", "no runtime supports the format 'onnx'"),
        (isvc(), offered(disabled=True), "NoSupportingRuntime", "rt: it is disabled"),
        (isvc(runtime="rt"), offered(disabled=True), "RuntimeDisabled", "'rt' is disabled"),
        (isvc(runtime="x"), [ONNX], "RuntimeNotRecognized", "there is no ServingRuntime"),
    ],
)
def test_it_is_told_why_and_what_was_there_serves_on(
    resource: dict[str, Any], offers: list[RuntimeOffer], reason: str, said: str
) -> None:
    never, before = World(offers=offers), served()
    never.apply(resource)
    assert kinds(never.plan(ISVC, "n")) == ["Emit", "WriteStatus"]
    before.offers = offers
    alias = before.alias()
    before.apply(resource)
    for world in (never, before):
        world.reconcile()
        model_status = world.status()["modelStatus"]
        assert model_status["transitionStatus"] == "InvalidSpec"
        assert model_status["lastFailureInfo"]["reason"] == reason
        assert said in model_status["lastFailureInfo"]["message"]
    assert condition(never)["status"] == "False"
    assert said in condition(never)["message"]
    assert condition(before)["status"] == "True"
    assert before.alias() == alias
    assert never.view.vmodels == {}


def test_what_the_registry_refuses_for_good_is_told() -> None:
    world = World()
    world.apply(isvc())
    observed = replace(world.observed(ISVC, "n"), register_fault="too large")
    _, status = plan_service(world.resources[ISVC, "n"], observed)
    assert isinstance(status, WriteStatus)
    assert status.status["modelStatus"]["transitionStatus"] == "InvalidSpec"


@pytest.mark.parametrize(
    ("alias", "model", "said"),
    [
        (VModelRecord("n", "m", "m", owner="ksp"), None, "belongs to the Predictor of that name"),
        (VModelRecord("n", "m", "m", owner="me"), None, "an alias of owner 'me'"),
        (VModelRecord("n", "m", "m"), None, "an alias of no owner"),
        (None, ModelRecord("n", "onnx"), "the id of a directly registered model"),
    ],
)
def test_a_taken_name_is_left_alone_and_its_owner_named(
    alias: VModelRecord | None, model: ModelRecord | None, said: str
) -> None:
    world = World()
    if alias is not None:
        world.view.put_vmodel(alias)
    if model is not None:
        world.view.put_model(model)
    world.apply(isvc())
    world.reconcile()
    failure = world.status()["modelStatus"]["lastFailureInfo"]
    assert failure["reason"] == "InvalidPredictorSpec"
    assert said in failure["message"]
    assert "url" not in world.status()
    world.delete(ISVC, "n")
    world.reconcile()
    assert world.view.vmodels.get("n") == alias
    assert ("n" in world.view.models) == (model is not None)


def test_the_name_goes_to_the_other_kind_when_it_is_free() -> None:
    world = served()
    world.apply(ksp())
    world.reconcile()
    assert world.status(KSP)["transitionStatus"] == "InvalidSpec"
    world.delete(ISVC, "n")
    world.reconcile()
    assert world.alias().owner == "ksp"
    assert world.status(KSP)["transitionStatus"] == "InProgress"


# ---- whose it is --------------------------------------------------------------------------------


def marked(mode: str | None) -> dict[str, Any]:
    resource = isvc()
    resource["metadata"]["annotations"] = {"serving.kserve.io/deploymentMode": mode} if mode else {}
    return resource


@pytest.mark.parametrize(
    ("resource", "take_all", "expected"),
    [
        (marked("ModelMesh"), False, True),
        (marked("Standard"), False, False),
        (marked(None), False, False),
        (marked(None), True, True),
        (marked("Standard"), True, True),
        (ksp(), False, True),
    ],
)
def test_is_ours(resource: dict[str, Any], take_all: bool, expected: bool) -> None:
    assert is_ours(resource, take_all=take_all) is expected
    world = World(take_all=take_all)
    world.apply(resource)
    assert bool(world.plan(resource["kind"], "n")) is expected


def test_one_that_is_ours_no_more_is_let_go_and_left_alone() -> None:
    world = served()
    world.apply(marked("Standard"))
    assert kinds(world.plan(ISVC, "n")) == ["Unregister", "WriteStatus", "RemoveFinalizer"]
    world.reconcile()
    assert (world.view.vmodels, world.status()) == ({}, {})
    world.resources[ISVC, "n"]["status"] = {"url": "http://somebody.else"}
    assert world.plan(ISVC, "n") == ()


def test_one_that_is_ours_no_more_is_unregistered_though_its_finalizer_was_taken_off() -> None:
    world = served()
    world.force_off(ISVC, "n")
    world.apply(marked("Standard"))
    assert kinds(world.plan(ISVC, "n")) == ["Unregister", "WriteStatus"]


def test_orphans_are_what_an_api_servers_resource_left_behind() -> None:
    world = served()
    world.register(parse_resource(isvc("by-hand")))
    world.view.put_vmodel(VModelRecord("direct", "m", "m"))
    world.view.put_vmodel(VModelRecord("other", "m", "m", owner="me", manifest="{}"))
    aliases = list(world.view.vmodels.values())
    resources = list(world.resources.values())
    assert plan_orphans(resources, aliases) == ()
    (gone,) = plan_orphans([], aliases)
    assert (gone.name, gone.owner) == ("n", "isvc")
    (gone,) = plan_orphans([ksp("n")], aliases)
    assert gone.name == "n"
    unmarked = {**resources[0], "metadata": {"name": "n"}}
    assert len(plan_orphans([unmarked], aliases)) == 1
    assert plan_orphans([unmarked], aliases, take_all=True) == ()
    held = {**resources[0], "metadata": {"name": "n", "finalizers": [FINALIZER]}}
    assert plan_orphans([held], aliases) == ()


def test_one_applied_by_hand_is_taken_over_and_one_that_is_only_alike_is_not_deleted() -> None:
    world = World()
    world.register(parse_resource(isvc(uri="s3://b/hand")))
    world.apply(isvc(uri="wrong"))
    world.reconcile()
    world.delete(ISVC, "n")
    world.reconcile()
    assert "n" in world.view.vmodels
    world.apply(isvc())
    world.reconcile()
    world.delete(ISVC, "n")
    world.reconcile()
    assert world.view.vmodels == {}


# ---- labels, secrets, warnings ------------------------------------------------------------------


def test_a_named_runtime_is_required_and_a_chosen_one_preferred() -> None:
    world = World()
    world.apply(isvc(runtime="rt"))
    world.apply(isvc("m"))
    found = {}
    for name in ("n", "m"):
        (register,) = (a for a in world.plan(ISVC, name) if isinstance(a, Register))
        model = register.applied.model
        found[name] = (model.required_labels, model.preferred_labels)
    assert found == {"n": (("rt:rt",), ()), "m": ((), ("rt:rt",))}
    assert not register.applied.warnings
    world.reconcile()
    assert world.status()["servingRuntimeName"] == "rt"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (None, "specified storage key 'q' not found: there is no storage secret 'storage-config'"),
        (
            frozenset({"k"}),
            "specified storage key 'q' not found in storage secret 'storage-config' of namespace "
            "'ns'; its keys: k",
        ),
    ],
)
def test_a_missing_key_is_told_and_it_is_registered_all_the_same(
    keys: frozenset[str] | None, said: str
) -> None:
    world = World(secret_keys=keys)
    resource = isvc()
    model = resource["spec"]["predictor"]["model"]
    del model["storageUri"]
    model["storage"] = {"key": "q", "path": "p"}
    world.apply(resource)
    world.reconcile()
    assert "n" in world.view.vmodels
    failure = world.status()["modelStatus"]["lastFailureInfo"]
    assert failure["reason"] == "ModelLoadFailed"
    assert failure["message"].startswith(said)
    assert condition(world)["message"].startswith(said)
    world.secret_keys = frozenset({"q"})
    world.reconcile()
    assert world.status()["modelStatus"]["transitionStatus"] == "InProgress"
    assert StorageSecret("s", "ns", frozenset({"q"})).fault("") == ""


def test_fields_that_are_not_acted_on_are_named_once_a_generation() -> None:
    world = World()
    world.apply(isvc(oops=1, confidential=True))
    world.reconcile()
    (told,) = (event for event in world.events if event[1] == "FieldsNotActedOn")
    assert told[2] == (
        "spec.predictor.model.confidential: kept, not acted on; "
        "spec.predictor.model.oops: unknown field, ignored"
    )
    assert world.events[told] == 1
    world.apply(isvc(uri="s3://b/2", oops=1, confidential=True))
    world.reconcile()
    assert world.events[told] == 2
    status = world.resources[ISVC, "n"].pop("status")
    remembered = world.observed(ISVC, "n", warned_generation=2)
    assert kinds(plan_service(world.resources[ISVC, "n"], remembered)) == ["WriteStatus"]
    assert status


def test_a_failure_is_told_again_only_when_it_changes() -> None:
    world = served(load=False)
    world.load("n", fails=True)
    world.reconcile()
    world.now_ms += 600_000
    world.load("n", fails=True)
    world.reconcile()
    assert world.events["Warning", "ModelLoadFailed", "bad"] == 1


def test_a_service_without_a_finalizer_gets_it_back() -> None:
    world = served()
    world.force_off(ISVC, "n")
    assert world.plan(ISVC, "n") == (AddFinalizer(),)
