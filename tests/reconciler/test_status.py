"""What a name's state in the registry is in the words that KServe's users read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh.core.types import (
    CopyRecord,
    CopyState,
    FailureRecord,
    InstanceRecord,
    InstanceState,
    ModelRecord,
    VModelRecord,
)
from mesh.core.view import ClusterView
from mesh.kserve_status import (
    NO_REGISTRY,
    NameState,
    Refusal,
    Standing,
    endpoints_of,
    name_state,
    pod_of,
    same_status,
    service_status,
    standing_of,
)
from mesh.runtime_selection import Chosen

NOW = 1_760_000_000_000
POD = "modelmesh-serving-mlserver-5d9f7c9b8-x2x4z"
ENDPOINTS = endpoints_of("ns")
ISVC = {"kind": "InferenceService", "metadata": {"name": "n", "generation": 3}}
KSP = {"kind": "Predictor", "metadata": {"name": "n", "generation": 3}}


def view(alias: VModelRecord | None, *copies: tuple[str, CopyState], pods: int = 1) -> ClusterView:
    """A mesh with the models ``one`` and ``two``."""
    found = ClusterView()
    for at in range(pods):
        instance_id = f"{POD[:-1]}{at}-0a1b2c3d"
        ready = InstanceRecord(instance_id, "h:1", InstanceState.READY, 1, model_types=("onnx",))
        found.put_instance(ready)
    for model_id in ("one", "two"):
        found.put_model(ModelRecord(model_id, "onnx"))
    for model_id, state in copies:
        found.put_copy(CopyRecord(model_id, next(iter(found.instances)), state))
    if alias is not None:
        found.put_vmodel(alias)
    return found


def failing(mesh: ClusterView, model_id: str) -> ClusterView:
    instance_id = next(iter(mesh.instances))
    mesh.put_failure(FailureRecord(model_id, instance_id, "INTERNAL", "bad file", NOW, NOW + 9))
    return mesh


FIRST = VModelRecord("n", "one", "one", awaits_load=True)
SETTLED = VModelRecord("n", "one", "one")
SWITCHING = VModelRecord("n", "one", "two")
LOADED, LOADING = ("one", CopyState.LOADED), ("one", CopyState.LOADING)
TARGET_LOADING = ("two", CopyState.LOADING)
HELD = replace(SWITCHING, failed="model 'two' failed to load")


@pytest.mark.parametrize(
    ("mesh", "ready", "active", "target", "transition"),
    [
        pytest.param(view(None), False, "Pending", "Pending", "InProgress", id="not there"),
        pytest.param(view(FIRST), False, "Pending", "Pending", "InProgress", id="new"),
        pytest.param(view(FIRST, LOADING), False, "Loading", "Loading", "InProgress", id="first"),
        pytest.param(view(FIRST, LOADED), True, "Loaded", "Loaded", "UpToDate", id="just loaded"),
        pytest.param(
            failing(view(FIRST), "one"),
            *(False, "FailedToLoad", "FailedToLoad", "BlockedByFailedLoad"),
            id="its first load failed",
        ),
        pytest.param(
            view(replace(FIRST, failed="too large")),
            *(False, "FailedToLoad", "FailedToLoad", "BlockedByFailedLoad"),
            id="nowhere to load it",
        ),
        pytest.param(
            failing(view(replace(FIRST, failed="bad"), LOADING), "one"),
            *(False, "Loading", "Loading", "InProgress"),
            id="tried again",
        ),
        pytest.param(view(SETTLED, LOADED), True, "Loaded", "Loaded", "UpToDate", id="serves"),
        pytest.param(view(SETTLED), True, "Standby", "Standby", "UpToDate", id="evicted"),
        pytest.param(view(SETTLED, pods=0), True, "Standby", "Standby", "UpToDate", id="no pods"),
        pytest.param(
            view(SETTLED, LOADING), True, "Loading", "Loading", "UpToDate", id="loaded once more"
        ),
        pytest.param(
            failing(view(SETTLED), "one"),
            *(False, "FailedToLoad", "FailedToLoad", "BlockedByFailedLoad"),
            id="does not load any more",
        ),
        pytest.param(
            failing(view(SETTLED, LOADED, pods=2), "one"),
            *(True, "Loaded", "Loaded", "UpToDate"),
            id="a second copy failed",
        ),
        pytest.param(
            view(SWITCHING, LOADED), True, "Loaded", "Pending", "InProgress", id="a new spec"
        ),
        pytest.param(
            view(SWITCHING, LOADED, TARGET_LOADING),
            *(True, "Loaded", "Loading", "InProgress"),
            id="the new one is being loaded",
        ),
        pytest.param(
            failing(view(HELD, LOADED), "two"),
            *(True, "Loaded", "FailedToLoad", "BlockedByFailedLoad"),
            id="the new one failed",
        ),
        pytest.param(
            view(HELD), True, "Standby", "FailedToLoad", "BlockedByFailedLoad", id="held, evicted"
        ),
        pytest.param(
            view(HELD, LOADED, TARGET_LOADING),
            *(True, "Loaded", "Loading", "BlockedByFailedLoad"),
            id="the new one is tried again",
        ),
        pytest.param(
            view(replace(SWITCHING, awaits_load=True)),
            *(False, "Pending", "Pending", "InProgress"),
            id="changed before it was ever loaded",
        ),
    ],
)
def test_standing(
    mesh: ClusterView, ready: bool, active: str, target: str, transition: str
) -> None:
    found = standing_of(name_state(mesh, "n", NOW))
    assert (found.ready, found.active, found.target) == (ready, active, target)
    assert found.transition == transition
    assert bool(found.message) == (transition != "UpToDate")


def test_a_wrong_spec_leaves_what_serves() -> None:
    refusal = Refusal("InvalidPredictorSpec", "spec.x: expected y")
    found = standing_of(name_state(view(SETTLED, LOADED), "n", NOW), refusal=refusal)
    assert (found.ready, found.active, found.target) == (True, "Loaded", "FailedToLoad")
    assert (found.transition, found.reason, found.message) == (
        *("InvalidSpec", "InvalidPredictorSpec", "spec.x: expected y"),
    )
    never = standing_of(NameState("n"), refusal=refusal)
    assert (never.ready, never.active, never.target) == (False, "Pending", "FailedToLoad")


@pytest.mark.parametrize(
    ("mesh", "ready", "told"),
    [
        pytest.param(view(FIRST), False, True, id="new"),
        pytest.param(view(FIRST, LOADING), False, False, id="loading all the same"),
        pytest.param(view(SETTLED, LOADED), True, False, id="loaded all the same"),
        pytest.param(view(SETTLED), False, True, id="evicted, and cannot come back"),
        pytest.param(view(SWITCHING, LOADED), True, True, id="the old one serves"),
    ],
)
def test_a_secret_without_the_key_is_told_where_it_is_needed(
    mesh: ClusterView, ready: bool, told: bool
) -> None:
    fault = "specified storage key 'k' not found"
    found = standing_of(name_state(mesh, "n", NOW), secret_fault=fault)
    assert found.ready is ready
    assert (found.failure is not None and found.failure.message == fault) is told
    assert (found.transition == "BlockedByFailedLoad") is told


def test_the_message_names_what_is_missing() -> None:
    nobody = standing_of(name_state(view(FIRST, pods=0), "n", NOW), runtime="triton-2.x")
    assert nobody.message == "one waits for a serving pod of the runtime 'triton-2.x' to be ready"
    failed = standing_of(name_state(view(replace(FIRST, failed="no"), pods=0), "n", NOW))
    assert failed.reason == "RuntimeUnhealthy"
    held = standing_of(name_state(failing(view(HELD, LOADED), "two"), "n", NOW))
    assert held.message == "bad file; the model from before goes on serving"


# ---- as it is written ---------------------------------------------------------------------------


def written(
    mesh: ClusterView, resource: dict[str, Any], before: object = None, now_ms: int = NOW
) -> dict[str, Any]:
    return service_status(
        {**resource, "status": before},
        standing_of(name_state(mesh, "n", now_ms)),
        chosen=Chosen("mlserver", cluster=True, explicit=False),
        endpoints=ENDPOINTS,
        now_ms=now_ms,
    )


def test_the_status_of_an_inference_service_that_serves() -> None:
    assert written(view(SETTLED, LOADED), ISVC) == {
        "observedGeneration": 3,
        "deploymentMode": "ModelMesh",
        "clusterServingRuntimeName": "mlserver",
        "url": "grpc://modelmesh-serving.ns:8033",
        "address": {"url": "http://modelmesh-serving.ns:8008"},
        "components": {
            "predictor": {
                "url": "grpc://modelmesh-serving.ns:8033",
                "grpcUrl": "grpc://modelmesh-serving.ns:8033",
                "restUrl": "http://modelmesh-serving.ns:8008",
                "latestCreatedRevision": "one",
                "latestReadyRevision": "one",
                "traffic": [{"revisionName": "one", "percent": 100, "latestRevision": True}],
            }
        },
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": "2025-10-09T08:53:20Z"}
            for kind in ("IngressReady", "PredictorReady", "Ready")
        ],
        "modelStatus": {
            "transitionStatus": "UpToDate",
            "states": {"activeModelState": "Loaded", "targetModelState": "Loaded"},
            "copies": {"failedCopies": 0, "totalCopies": 1},
        },
    }


def test_the_status_of_one_whose_new_spec_failed() -> None:
    status = written(failing(view(HELD, LOADED), "two"), ISVC)
    assert status["modelStatus"] == {
        "transitionStatus": "BlockedByFailedLoad",
        "states": {"activeModelState": "Loaded", "targetModelState": "FailedToLoad"},
        "copies": {"failedCopies": 1, "totalCopies": 1},
        "lastFailureInfo": {
            "reason": "ModelLoadFailed",
            "message": "bad file",
            "modelRevisionName": "two",
            "location": (POD[:-1] + "0")[-12:],
            "time": "2025-10-09T08:53:20Z",
        },
    }
    (traffic,) = status["components"]["predictor"]["traffic"]
    assert (traffic["tag"], traffic["latestRevision"]) == ("prev", False)


def test_the_status_of_a_predictor() -> None:
    flat = {
        "observedGeneration": 3,
        "available": True,
        "transitionStatus": "UpToDate",
        "activeModelState": "Loaded",
        "targetModelState": "",
        "totalCopies": 1,
        "failedCopies": 0,
        "grpcEndpoint": "grpc://modelmesh-serving.ns:8033",
        "httpEndpoint": "http://modelmesh-serving.ns:8008",
    }
    assert written(view(SETTLED, LOADED), KSP) == flat
    failed = written(failing(view(HELD, LOADED), "two"), KSP)
    assert (failed["targetModelState"], failed["available"]) == ("FailedToLoad", True)
    assert failed["lastFailureInfo"]["modelId"] == "two"


def test_nobody_to_talk_to_is_not_ready() -> None:
    status = service_status(
        ISVC,
        standing_of(name_state(view(SETTLED, LOADED), "n", NOW)),
        chosen=None,
        endpoints=replace(ENDPOINTS, fault="no router is running"),
        now_ms=NOW,
    )
    conditions = {one["type"]: one for one in status["conditions"]}
    assert {kind: one["status"] for kind, one in conditions.items()} == {
        "IngressReady": "False",
        "PredictorReady": "True",
        "Ready": "False",
    }
    assert conditions["Ready"]["message"] == "no router is running"


def test_a_conditions_time_moves_with_its_status_alone() -> None:
    before = written(view(FIRST, LOADING), ISVC)
    failed = written(failing(view(FIRST), "one"), ISVC, before, NOW + 5_000)
    ready = written(view(SETTLED, LOADED), ISVC, failed, NOW + 9_000)
    times = [
        {one["type"]: one["lastTransitionTime"][-3:] for one in status["conditions"]}
        for status in (before, failed, ready)
    ]
    assert times == [
        {"IngressReady": "20Z", "PredictorReady": "20Z", "Ready": "20Z"},
        {"IngressReady": "20Z", "PredictorReady": "20Z", "Ready": "20Z"},
        {"IngressReady": "20Z", "PredictorReady": "29Z", "Ready": "29Z"},
    ]
    assert "lastFailureInfo" not in ready["modelStatus"]


def test_the_last_failure_is_told_while_it_is_tried_again() -> None:
    failed = written(failing(view(FIRST), "one"), ISVC)
    again = written(view(FIRST, LOADING), ISVC, failed)
    assert again["modelStatus"]["lastFailureInfo"] == failed["modelStatus"]["lastFailureInfo"]
    other = written(view(SWITCHING, LOADED, TARGET_LOADING), ISVC, failed)
    assert "lastFailureInfo" not in other["modelStatus"]


def test_what_others_wrote_of_their_components_is_kept() -> None:
    theirs = {"type": "TransformerReady", "status": "True"}
    before = {
        "conditions": [theirs, {"type": "PredictorRouteReady", "status": "False"}],
        "components": {"transformer": {"url": "u"}, "predictor": {"url": "old"}},
    }
    status = written(view(SETTLED, LOADED), ISVC, before)
    kinds = [one["type"] for one in status["conditions"]]
    assert kinds == ["IngressReady", "PredictorReady", "Ready", "TransformerReady"]
    assert status["components"]["transformer"] == {"url": "u"}


def test_times_alone_are_no_change() -> None:
    mesh = failing(view(HELD, LOADED), "two")
    one, later = written(mesh, ISVC), written(mesh, ISVC, now_ms=NOW + 5)
    assert same_status(one, later)
    mesh.put_failure(replace(next(iter(mesh.all_failures())), failed_at_ms=NOW + 3))
    assert same_status(one, written(mesh, ISVC))
    mesh.put_failure(replace(next(iter(mesh.all_failures())), message="worse"))
    assert not same_status(one, written(mesh, ISVC))
    assert same_status(None, {})
    assert not same_status(None, one)


def test_a_long_message_is_cut_to_what_a_condition_takes() -> None:
    standing = Standing(False, "Pending", "Pending", "InProgress", "Pending", "x\n" * 5_000)
    status = service_status(ISVC, standing, chosen=None, endpoints=ENDPOINTS, now_ms=NOW)
    (message,) = {one["message"] for one in status["conditions"] if "message" in one}
    assert len(message) == 1_024
    assert "\n" not in message


def test_a_registry_that_is_away_is_said() -> None:
    status = service_status(ISVC, NO_REGISTRY, chosen=None, endpoints=ENDPOINTS, now_ms=NOW)
    assert {one.get("reason") for one in status["conditions"]} == {None, "RegistryAway"}
    assert "url" not in status


@pytest.mark.parametrize(
    ("instance_id", "pod"),
    [(f"{POD}-0123abcd", POD), (POD, POD), ("local-0-00000000", "local-0"), ("a", "a"), ("", "")],
)
def test_the_pod_of_an_instance(instance_id: str, pod: str) -> None:
    assert pod_of(instance_id) == pod
