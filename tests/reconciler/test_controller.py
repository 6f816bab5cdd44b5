"""The whole controller: a resource becomes a registered model; what becomes of it comes back."""

from __future__ import annotations

import pytest

from mesh.reconciler.kube_resources import INFERENCE_SERVICES, PREDICTORS, SECRETS
from mesh.reconciler.plan import FINALIZER
from tests.reconciler.rig import Rig, condition, isvc, runtime, until

pytestmark = [pytest.mark.kube, pytest.mark.etcd]


async def test_an_inference_service_is_registered_loaded_and_ready(rig: Rig) -> None:
    await rig.start()
    await rig.mesh.instance()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    made = await rig.apply(isvc("iris", rig.namespace))
    alias = await rig.mesh.registered("iris")
    assert alias.awaits_load and alias.owner == "isvc"
    waiting = await rig.status("iris", lambda s: s.get("modelStatus"))
    assert condition(waiting, "Ready")["status"] != "True"
    assert waiting["modelStatus"]["transitionStatus"] == "InProgress"
    await rig.mesh.load("iris")
    status = await rig.ready("iris")
    assert status["modelStatus"]["states"] == {
        "activeModelState": "Loaded",
        "targetModelState": "Loaded",
    }
    assert status["modelStatus"]["transitionStatus"] == "UpToDate"
    assert status["modelStatus"]["copies"] == {"failedCopies": 0, "totalCopies": 1}
    assert status["url"] == f"grpc://modelmesh-serving.{rig.namespace}:8033"
    assert status["observedGeneration"] == made["metadata"]["generation"]
    assert FINALIZER in (await rig.get("iris"))["metadata"]["finalizers"]


async def test_a_changed_spec_is_loaded_before_the_old_one_goes(rig: Rig) -> None:
    await rig.start()
    await rig.mesh.instance()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    old = (await rig.mesh.registered("iris")).target_model_id
    await rig.mesh.load("iris")
    await rig.ready("iris")
    await rig.apply(isvc("iris", rig.namespace, uri="s3://models/two"))
    moving = await rig.mesh.registered("iris", besides=old)
    assert moving.active_model_id == old
    await rig.mesh.fail("iris", "no such key: two")
    blocked = await rig.status(
        "iris", lambda s: s["modelStatus"]["transitionStatus"] == "BlockedByFailedLoad"
    )
    assert condition(blocked, "Ready")["status"] == "True"  # the old one goes on serving
    failure = blocked["modelStatus"]["lastFailureInfo"]
    assert failure["reason"] == "ModelLoadFailed" and "no such key: two" in failure["message"]
    await rig.apply(isvc("iris", rig.namespace, uri="s3://models/three"))
    await rig.mesh.registered("iris", besides=moving.target_model_id)
    await rig.mesh.load("iris")
    await rig.status("iris", lambda s: s["modelStatus"]["transitionStatus"] == "UpToDate")


async def test_deleting_it_unregisters_it_first(rig: Rig) -> None:
    await rig.start()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    await rig.mesh.registered("iris")
    await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")
    await rig.gone("iris")
    assert await rig.mesh.aliases() == {} and await rig.mesh.models() == set()


async def test_nothing_is_written_while_nothing_changes(rig: Rig) -> None:
    controller = await rig.start()
    await rig.mesh.instance()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    for number in range(5):
        await rig.apply(isvc(f"m{number}", rig.namespace))
        await rig.mesh.registered(f"m{number}")
        await rig.mesh.load(f"m{number}")
    for number in range(5):
        await rig.ready(f"m{number}")
    await rig.idle()
    before = rig.writes
    controller.names_changed(rig.namespace, None)
    await rig.idle()
    assert rig.writes == before


# ---- what cannot be served ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        pytest.param(
            {"runtime": "nobody"}, "RuntimeNotRecognized", "'nobody'", id="unknown runtime"
        ),
        pytest.param({"runtime": "off"}, "RuntimeDisabled", "'off'", id="disabled runtime"),
        pytest.param(
            {"model_format": "tensorrt"}, "NoSupportingRuntime", "'tensorrt'", id="no runtime"
        ),
        pytest.param(
            {"uri": "no-scheme"},
            "InvalidPredictorSpec",
            "spec.predictor.model.storageUri",
            id="a wrong field",
        ),
    ],
)
async def test_it_says_why_not_and_registers_nothing(
    rig: Rig, change: dict[str, str], reason: str, said: str
) -> None:
    await rig.start()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(runtime("off", rig.namespace, disabled=True))
    await rig.apply(isvc("iris", rig.namespace, **change))
    status = await rig.status("iris", lambda s: (s.get("modelStatus") or {}).get("lastFailureInfo"))
    failure = status["modelStatus"]["lastFailureInfo"]
    assert failure["reason"] == reason and said in failure["message"]
    assert status["modelStatus"]["transitionStatus"] == "InvalidSpec"
    assert condition(status, "Ready")["status"] == "False"
    assert await rig.mesh.aliases() == {}
    event = await rig.event("iris", reason)
    assert event["type"] == "Warning" and said in event["message"]


async def test_a_runtime_that_comes_later_is_taken(rig: Rig) -> None:
    await rig.start()
    await rig.apply(isvc("iris", rig.namespace))
    await rig.status("iris", lambda s: s.get("modelStatus"))
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.mesh.registered("iris")


async def test_a_name_belongs_to_who_was_first(rig: Rig) -> None:
    await rig.start()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    first = await rig.mesh.registered("iris")
    await rig.apply(
        {
            "apiVersion": PREDICTORS.api_version,
            "kind": "Predictor",
            "metadata": {"name": "iris", "namespace": rig.namespace},
            "spec": {
                "modelType": {"name": "onnx"},
                "path": "other",
                "storage": {"s3": {"secretKey": "main"}},
            },
        }
    )
    status = await rig.status("iris", lambda s: s.get("lastFailureInfo"), PREDICTORS)
    assert "belongs to the InferenceService" in status["lastFailureInfo"]["message"]
    assert (await rig.mesh.registered("iris")).target_model_id == first.target_model_id
    await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")
    await rig.gone("iris")

    async def taken_over() -> bool:
        alias = await rig.mesh.alias("iris")
        return alias is not None and alias.owner == "ksp"

    await until(taken_over, what="the Predictor to have the name")


async def test_a_missing_key_is_named_and_its_coming_tried_at_once(rig: Rig) -> None:
    await rig.start()
    await rig.mesh.instance()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    storage = {"key": "minio", "path": "iris.onnx"}
    await rig.apply(isvc("iris", rig.namespace, uri="", storage=storage))
    alias = await rig.mesh.registered("iris")
    await rig.mesh.fail("iris", "no storage key minio")
    status = await rig.status("iris", lambda s: (s.get("modelStatus") or {}).get("lastFailureInfo"))
    message = status["modelStatus"]["lastFailureInfo"]["message"]
    assert "'minio'" in message and "storage-config" in message
    await rig.client.create(
        SECRETS,
        {
            "metadata": {"name": "storage-config", "namespace": rig.namespace},
            "stringData": {"minio": '{"type": "s3", "access_key_id": "me"}'},
        },
    )

    async def forgotten() -> bool:
        found = await rig.mesh.store.range(f"failures/{alias.target_model_id}")
        return not found.items

    await until(forgotten, what="the failure to be forgotten")
