"""KServe's kinds: what is applied where, and what kubectl's users see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from protos import mesh_admin_pb2 as pb
from tests.cli.conftest import Mesh
from tests.cli.fake_router import FakeRouter, accept_all

GROUP = "serving.kserve.io"
ENTRY = '{"type":"s3","secret_access_key":"hidden"}'


def resource(kind: str, name: str, **parts: Any) -> dict[str, Any]:
    version = "v1beta1" if kind == "InferenceService" else "v1alpha1"
    head = {"apiVersion": f"{GROUP}/{version}", "kind": kind}
    return {**head, "metadata": {"name": name}, **parts}


def secret(**entries: str) -> dict[str, Any]:
    head = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "storage-config"}}
    return {**head, "stringData": entries}


def stdin_of(*resources: dict[str, Any]) -> str:
    return yaml.safe_dump_all(resources)


def status(ready: str, **condition: str) -> dict[str, Any]:
    share = {"revisionName": "iris__isvc-0", "percent": 100, "latestRevision": True}
    return {
        "url": "grpc://127.0.0.1:8033",
        "conditions": [
            {
                "type": kind,
                "status": ready,
                "lastTransitionTime": "2024-01-01T00:00:00Z",
                **condition,
            }
            for kind in ("PredictorReady", "Ready")
        ],
        "components": {"predictor": {"traffic": [share] if ready == "True" else []}},
        "modelStatus": {
            "transitionStatus": "UpToDate",
            "states": {"activeModelState": "Loaded", "targetModelState": "Loaded"},
        },
        "servingRuntimeName": "rt",
    }


# ---- apply ---------------------------------------------------------------------------------------


def test_a_secret_becomes_files_and_is_sent_to_nobody(
    router: FakeRouter, mesh: Mesh, tmp_path: Path
) -> None:
    forgotten = pb.ForgetFailuresResponse(models=1).SerializeToString()
    router.answers["ForgetFailures"] = lambda request: forgotten
    flags = ("--storage-config", str(tmp_path))
    for entries, action in (
        ({"a": ENTRY, "b": ENTRY}, "created"),
        ({"a": ENTRY, "b": ENTRY}, "unchanged"),
        ({"a": ENTRY}, "configured"),
    ):
        done = mesh("apply", "-f", "-", *flags, stdin=stdin_of(secret(**entries)))
        assert (done.exit_code, done.stdout) == (0, f"secret/storage-config {action}\n")
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["a"]
    assert (tmp_path / "a").read_text() == ENTRY
    assert [method for method, _ in router.calls] == ["ForgetFailures"] * 2
    assert not any(request for _, request in router.calls)


def test_a_secret_is_kept_though_the_mesh_cannot_try_again(mesh: Mesh, tmp_path: Path) -> None:
    flags = ("--storage-config", str(tmp_path))
    done = mesh("apply", "-f", "-", *flags, stdin=stdin_of(secret(a=ENTRY)))
    assert (done.exit_code, done.stdout) == (0, "secret/storage-config created\n")
    assert "tried again only when their failures expire" in done.stderr
    assert (tmp_path / "a").exists()


def test_the_folder_is_that_of_the_mesh_here_if_it_is_the_mesh_asked(
    router: FakeRouter, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = stdin_of(secret(a=ENTRY))
    done = mesh("apply", "-f", "-", stdin=text)
    assert done.exit_code == 1 and "there is no mesh in .mesh of this folder" in done.stderr
    folder = tmp_path / ".mesh" / "storage-config"
    folder.mkdir(parents=True)
    state = {"grpc": "127.0.0.1:1", "storage_config": str(folder)}
    (tmp_path / ".mesh" / "state.json").write_text(json.dumps(state))
    done = mesh("apply", "-f", "-", stdin=text)
    assert done.exit_code == 1 and "is another one, at 127.0.0.1:1" in done.stderr
    assert "--storage-config DIR" in done.stderr and not list(folder.iterdir())
    port = router.address.rpartition(":")[2]
    state["grpc"] = f"localhost:{port}"
    (tmp_path / ".mesh" / "state.json").write_text(json.dumps(state))
    assert mesh("apply", "-f", "-", stdin=text).stdout == "secret/storage-config created\n"
    assert (folder / "a").read_text() == ENTRY


def test_a_wrong_secret_is_one_failed_resource_among_others(
    router: FakeRouter, mesh: Mesh, tmp_path: Path
) -> None:
    router.answers["Apply"] = accept_all()
    other = {**secret(a=ENTRY), "metadata": {"name": "other"}}
    text = stdin_of(resource("InferenceService", "iris"), other)
    done = mesh("apply", "-f", "-", "--storage-config", str(tmp_path), stdin=text)
    assert done.exit_code == 1 and "hidden" not in done.output
    assert "secret/other: metadata.name: the only secret" in done.stderr
    assert done.stdout == f"inferenceservice.{GROUP}/iris created\n"
    missing = ("--storage-config", str(tmp_path / "nowhere"))
    done = mesh("apply", "-f", "-", *missing, stdin=stdin_of(secret(a=ENTRY)))
    assert "no such folder" in done.stderr


def test_what_others_lean_on_goes_first_whatever_the_order_of_the_file(
    router: FakeRouter, mesh: Mesh, tmp_path: Path
) -> None:
    router.answers["Apply"] = accept_all()
    items = [
        resource("InferenceService", "b"),
        resource("ClusterServingRuntime", "c"),
        resource("Predictor", "a"),
        secret(a=ENTRY),
        resource("ServingRuntime", "r"),
    ]
    text = stdin_of({"apiVersion": "v1", "kind": "List", "items": items})
    done = mesh("apply", "-f", "-", "--storage-config", str(tmp_path), stdin=text)
    applied = [line.split()[0].replace(f".{GROUP}", "") for line in done.stdout.splitlines()]
    assert applied == [
        *("secret/storage-config", "clusterservingruntime/c", "servingruntime/r"),
        *("inferenceservice/b", "predictor/a"),
    ]


def test_nothing_waits_for_what_is_no_model(router: FakeRouter, mesh: Mesh) -> None:
    reply = pb.ApplyResponse(name="rt", action="created", warnings=["no pods are started"])
    router.answers["Apply"] = lambda request: reply.SerializeToString()
    done = mesh("apply", "-f", "-", "--wait", stdin=stdin_of(resource("ServingRuntime", "rt")))
    assert (done.exit_code, done.stdout) == (0, f"servingruntime.{GROUP}/rt created\n")
    assert "no pods are started" in done.stderr and not router.requests("List")


# ---- get -----------------------------------------------------------------------------------------


def test_get_isvc_is_kubectls_table(router: FakeRouter, mesh: Mesh) -> None:
    router.rows["inferenceservices"] = [
        resource("InferenceService", "iris", status=status("True")),
        resource("InferenceService", "bad", status=status("False", reason="ModelLoadFailed")),
        resource("InferenceService", "new", status={}),
    ]
    lines = [line.split() for line in mesh("get", "isvc").stdout.splitlines()]
    assert lines == [
        ["NAME", "URL", "READY", "PREV", "LATEST", "AGE"],
        ["bad", "grpc://127.0.0.1:8033", "False", "-", "-", "-"],
        ["iris", "grpc://127.0.0.1:8033", "True", "-", "100", "-"],
        ["new", "-", "-", "-", "-", "-"],
    ]
    wide = [line.split() for line in mesh("get", "isvc", "-o", "wide").stdout.splitlines()]
    assert wide[0][6:] == [
        *("PREVROLLEDOUTREVISION", "LATESTREADYREVISION", "STATE", "TARGET"),
        *("TRANSITION", "RUNTIME", "REASON"),
    ]
    assert wide[1][-2:] == ["rt", "ModelLoadFailed"] and "iris__isvc-0" in wide[2]


def test_get_isvc_structured_is_a_resource_or_a_list_that_can_be_applied(
    router: FakeRouter, mesh: Mesh
) -> None:
    found = [resource("InferenceService", name, status=status("True")) for name in ("a", "b")]
    router.rows["inferenceservices"] = found
    assert yaml.safe_load(mesh("get", "isvc", "a", "-o", "yaml").stdout) == found[0]
    request = pb.ListRequest.FromString(router.requests("List")[0])
    assert (request.kind, list(request.names)) == ("inferenceservices", ["a"])
    listed = json.loads(mesh("get", f"inferenceservices.{GROUP}", "-o", "json").stdout)
    assert (listed["kind"], listed["items"]) == ("List", found)
    names = mesh("get", "isvc", "-o", "name").stdout
    assert names == f"inferenceservice.{GROUP}/a\ninferenceservice.{GROUP}/b\n"
    done = mesh("get", "isvc", "zzz")
    assert (done.exit_code, done.stderr) == (
        1,
        "no isvc\nerror: not found: zzz; see `mesh get isvc`\n",
    )


def test_get_predictors(router: FakeRouter, mesh: Mesh) -> None:
    told = {"available": True, "activeModelState": "Loaded", "transitionStatus": "UpToDate"}
    router.rows["predictors"] = [
        resource("Predictor", "p", spec={"modelType": {"name": "onnx"}}, status=told)
    ]
    lines = [line.split() for line in mesh("get", "predictors").stdout.splitlines()]
    assert lines == [
        ["NAME", "TYPE", "AVAILABLE", "ACTIVEMODEL", "TARGETMODEL", "TRANSITION", "AGE"],
        ["p", "onnx", "true", "Loaded", "-", "UpToDate", "-"],
    ]


def test_get_runtimes_of_either_kind(router: FakeRouter, mesh: Mesh) -> None:
    spec = {
        "disabled": False,
        "supportedModelFormats": [{"name": "onnx", "version": "1"}, {"name": "onnx"}],
        "containers": [{"name": "server"}],
    }
    router.rows["servingruntimes"] = [
        resource("ClusterServingRuntime", "a", spec={}),
        resource("ServingRuntime", "b", spec=spec),
    ]
    lines = [line.split() for line in mesh("get", "runtimes").stdout.splitlines()]
    assert lines == [
        ["NAME", "KIND", "DISABLED", "MODELTYPE", "CONTAINERS", "AGE"],
        ["a", "ClusterServingRuntime", "-", "-", "-", "-"],
        ["b", "ServingRuntime", "false", "onnx", "server", "-"],
    ]
    names = mesh("get", "runtimes", "-o", "name").stdout
    assert names == f"clusterservingruntime.{GROUP}/a\nservingruntime.{GROUP}/b\n"
    only = mesh("get", "servingruntimes", "-o", "name").stdout
    assert only == f"servingruntime.{GROUP}/b\n"


# ---- describe and delete -------------------------------------------------------------------------


def test_describe_isvc_shows_ready_and_conditions(router: FakeRouter, mesh: Mesh) -> None:
    told = status("False", reason="ModelLoadFailed", message="no such bucket")
    told["modelStatus"]["lastFailureInfo"] = {"reason": "ModelLoadFailed", "message": "no bucket"}
    described = {"row": {"name": "iris", "state": "LOADING_FAILED"}, "status": told}
    router.answers["Describe"] = lambda request: pb.DescribeResponse(
        json=json.dumps(described)
    ).SerializeToString()
    text = mesh("describe", "isvc", "iris").stdout
    assert "Ready:      False\nTransition: UpToDate\nURL:        grpc://127.0.0.1:8033\n" in text
    assert "Last failure: ModelLoadFailed: no bucket\n" in text
    (line,) = (line for line in text.splitlines() if line.startswith("  PredictorReady: False for"))
    assert line.endswith("; ModelLoadFailed: no such bucket")


@pytest.mark.parametrize(
    ("kind", "sent", "label"),
    [
        ("runtime", "", "servingruntime"),
        ("servingruntime", "ServingRuntime", "servingruntime"),
        ("clusterservingruntimes", "ClusterServingRuntime", "clusterservingruntime"),
    ],
)
def test_delete_a_runtime(router: FakeRouter, mesh: Mesh, kind: str, sent: str, label: str) -> None:
    router.answers["DeleteRuntime"] = lambda request: pb.DeleteResponse(
        existed=pb.DeleteRuntimeRequest.FromString(request).name == "rt"
    ).SerializeToString()
    done = mesh("delete", kind, "rt")
    assert (done.exit_code, done.stdout) == (0, f"{label}.{GROUP}/rt deleted\n")
    request = pb.DeleteRuntimeRequest.FromString(router.requests("DeleteRuntime")[0])
    assert (request.name, request.kind) == ("rt", sent)
    assert mesh("delete", kind, "zzz").exit_code == 1


def test_a_router_that_is_older_deletes_no_model_in_a_runtimes_place(
    router: FakeRouter, mesh: Mesh
) -> None:
    router.answers["Delete"] = lambda request: pb.DeleteResponse(existed=True).SerializeToString()
    done = mesh("delete", "runtime", "rt")
    assert done.exit_code == 1 and "does not know this command" in done.stderr
    assert not router.requests("Delete")
