"""What `mesh up` applies a watched folder by, against a scripted router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesh.cli.connection import Target
from mesh.cli.up_front import MeshApplier
from mesh.folder_sync import Applied, SyncRefused
from protos import mesh_admin_pb2 as pb
from tests.cli.fake_router import FakeRouter


def secret(name: str = "storage-config", **entries: str) -> str:
    metadata = {"name": name}
    head = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}
    return json.dumps({**head, "stringData": entries})


def resource(kind: str, name: str) -> str:
    return json.dumps({"kind": kind, "metadata": {"name": name}})


@pytest.fixture
def applier(router: FakeRouter, tmp_path: Path) -> MeshApplier:
    def apply(request: bytes) -> bytes:
        sent: dict[str, Any] = json.loads(pb.ApplyRequest.FromString(request).manifest_json)
        is_model = sent["kind"] in ("InferenceService", "Predictor")
        reply = pb.ApplyResponse(name=sent["metadata"]["name"], action="created")
        reply.model_id = "m" if is_model else ""
        return reply.SerializeToString()

    router.answers["Apply"] = apply
    for method in ("Delete", "DeleteRuntime"):
        router.answers[method] = lambda request: pb.DeleteResponse().SerializeToString()
    forgotten = pb.ForgetFailuresResponse().SerializeToString()
    router.answers["ForgetFailures"] = lambda request: forgotten
    return MeshApplier(Target(router.address), tmp_path / "secrets")


def test_a_secret_of_the_folder_is_kept_here(
    applier: MeshApplier, router: FakeRouter, tmp_path: Path
) -> None:
    entry = tmp_path / "secrets" / "k"
    assert applier.apply(secret(k="v")) == Applied("Secret/storage-config", "created")
    assert entry.read_text() == "v"
    applier.delete("Secret/storage-config")
    assert not entry.exists()
    assert router.calls == [("ForgetFailures", b"")]
    with pytest.raises(SyncRefused, match="the only secret"):
        applier.apply(secret("other", k="v"))
    (tmp_path / "file").touch()
    nowhere = MeshApplier(Target(router.address), tmp_path / "file" / "secrets")
    with pytest.raises(SyncRefused, match="cannot be written"):
        nowhere.apply(secret(k="v"))


def test_what_is_no_model_is_deleted_as_its_kind(applier: MeshApplier, router: FakeRouter) -> None:
    kinds = ("InferenceService", "ServingRuntime", "ClusterServingRuntime", "InferenceGraph")
    names = [applier.apply(resource(kind, "n")).name for kind in kinds]
    assert names == ["n", "ServingRuntime/n", "ClusterServingRuntime/n", "InferenceGraph/n"]
    router.calls.clear()
    for name in (*names, "a/b"):
        applier.delete(name)
    deleted = [pb.DeleteRequest.FromString(one).name for one in router.requests("Delete")]
    assert deleted == ["n", "a/b"]
    runtimes = [pb.DeleteRuntimeRequest.FromString(r) for r in router.requests("DeleteRuntime")]
    assert [(one.kind, one.name) for one in runtimes] == [
        ("ServingRuntime", "n"),
        ("ClusterServingRuntime", "n"),
    ]
