"""The status is the controller's: written by the subresource and in no other way."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kube_server import KubeServer, Refused
from tests.reconciler.resources import KINDS, example, path_of

MERGE = "application/merge-patch+json"


@pytest.fixture
def created(kube: KubeServer, namespace: str, kind: str) -> dict[str, Any]:
    stored: dict[str, Any] = kube.request(
        "POST", path_of(kind, namespace), example(kind, name=namespace)
    )
    return stored


@pytest.mark.kube
@pytest.mark.parametrize("kind", KINDS)
def test_a_status_comes_by_the_subresource_only(
    kube: KubeServer, namespace: str, kind: str, created: dict[str, Any]
) -> None:
    path = path_of(kind, namespace, namespace)
    status = {"observedGeneration": 1}
    patched = kube.request("PATCH", path, {"status": status}, content_type=MERGE)
    assert "status" not in patched
    assert "status" not in kube.request("PUT", path, {**patched, "status": status})

    both = {"status": status, "spec": {"colour": "red"}}
    written = kube.request("PATCH", f"{path}/status", both, content_type=MERGE)

    assert written["status"] == status
    assert written["spec"] == created["spec"]
    assert written["metadata"]["generation"] == created["metadata"]["generation"]


@pytest.mark.kube
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_spec_counts_a_generation_and_keeps_the_status(
    kube: KubeServer, namespace: str, kind: str, created: dict[str, Any]
) -> None:
    path = path_of(kind, namespace, namespace)
    status = {"observedGeneration": created["metadata"]["generation"]}
    kube.request("PATCH", f"{path}/status", {"status": status}, content_type=MERGE)
    changed = kube.request("PATCH", path, {"spec": {"colour": "red"}}, content_type=MERGE)
    assert changed["status"] == status
    assert changed["metadata"]["generation"] == status["observedGeneration"] + 1


@pytest.mark.kube
@pytest.mark.parametrize(
    ("kind", "status", "field"),
    [
        (
            "InferenceService",
            {"modelStatus": {"transitionStatus": "Done"}},
            "status.modelStatus.transitionStatus",
        ),
        (
            "InferenceService",
            {"modelStatus": {"states": {"activeModelState": "Awake"}}},
            "status.modelStatus.states.activeModelState",
        ),
        (
            "InferenceService",
            {"modelStatus": {"lastFailureInfo": {"reason": "Tired"}}},
            "status.modelStatus.lastFailureInfo.reason",
        ),
        (
            "InferenceService",
            {"conditions": [{"type": "Ready", "status": True}]},
            "status.conditions.status",
        ),
        ("Predictor", {"available": "yes"}, "status.available"),
        ("Predictor", {"targetModelState": "Awake"}, "status.targetModelState"),
    ],
)
def test_a_status_that_no_client_would_understand_is_refused(
    kube: KubeServer,
    namespace: str,
    kind: str,
    created: dict[str, Any],
    status: dict[str, Any],
    field: str,
) -> None:
    path = f"{path_of(kind, namespace, namespace)}/status"
    with pytest.raises(Refused) as caught:
        kube.request("PATCH", path, {"status": status}, content_type=MERGE)
    assert caught.value.code == 422
    assert field in caught.value.fields, caught.value.fields
