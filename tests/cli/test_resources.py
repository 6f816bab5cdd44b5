"""apply, get, describe, delete and explain: what is sent, what is shown, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from mesh.admin_views import ModelRow
from mesh.cli.resources import settle
from protos import mesh_admin_pb2 as pb
from tests.cli.conftest import Mesh
from tests.cli.fake_router import FakeRouter, accept_all

ISVC = "inferenceservice.serving.kserve.io"


def manifest(name: str, **spec: Any) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {"name": name},
            "spec": {"predictor": {}, **spec},
        }
    )


def row(name: str, state: str = "LOADED", **more: Any) -> dict[str, Any]:
    return {"name": name, "state": state, "model_id": f"{name}__isvc-0", "alias": True, **more}


def test_apply_sends_the_resource_as_json_and_says_what_became_of_it(
    router: FakeRouter, mesh: Mesh, tmp_path: Path
) -> None:
    router.answers["Apply"] = accept_all({"iris": "configured"})
    (tmp_path / "iris.yaml").write_text(manifest("iris"))
    result = mesh("apply", "-f", str(tmp_path / "iris.yaml"), "--no-wait")
    assert (result.exit_code, result.stdout) == (0, f"{ISVC}/iris configured\n")
    (request,) = router.requests("Apply")
    sent = pb.ApplyRequest.FromString(request)
    assert json.loads(sent.manifest_json) == yaml.safe_load(manifest("iris"))
    assert sent.load_now


def test_apply_reads_stdin_and_can_leave_the_loading(router: FakeRouter, mesh: Mesh) -> None:
    router.answers["Apply"] = accept_all()
    text = manifest("a") + "---\n" + manifest("b")
    result = mesh("apply", "-f", "-", "--no-load", stdin=text)
    assert result.stdout == f"{ISVC}/a created\n{ISVC}/b created\n"
    assert not pb.ApplyRequest.FromString(router.requests("Apply")[0]).load_now


def test_apply_of_a_folder_goes_on_after_a_fault_and_ends_with_1(
    router: FakeRouter, mesh: Mesh, tmp_path: Path
) -> None:
    take = accept_all()

    def apply(request: bytes) -> bytes | tuple[grpc.StatusCode, str]:
        if b'"refused"' in request:
            return grpc.StatusCode.INVALID_ARGUMENT, "spec.predictor.minReplicas: expected a number"
        return take(request)

    router.answers["Apply"] = apply
    (tmp_path / "1.yaml").write_text("a: [")
    (tmp_path / "2.yaml").write_text(manifest("refused"))
    (tmp_path / "3.json").write_text(json.dumps(yaml.safe_load(manifest("good"))))
    (tmp_path / "notes.txt").write_text("not a manifest")
    result = mesh("apply", "-f", str(tmp_path))
    assert result.exit_code == 1
    assert result.stdout == f"{ISVC}/good created\n"
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"error: {tmp_path}/1.yaml: ")
    assert f"2.yaml: {ISVC}/refused: INVALID_ARGUMENT: spec.predictor.minReplicas" in lines[1]
    assert lines[2] == "error: 2 of 3 resources failed; see above"


def test_apply_shows_warnings_on_stderr(router: FakeRouter, mesh: Mesh) -> None:
    router.answers["Apply"] = accept_all()
    result = mesh("apply", "-f", "-", stdin=manifest("a", odd=1))
    assert result.exit_code == 0
    assert result.stderr == f"warning: stdin: {ISVC}/a: spec.odd: unknown field, ignored\n"


@pytest.mark.parametrize(
    ("format_", "expected"),
    [
        ("name", f"{ISVC}/a\n"),
        ("table", f"{ISVC}/a created\n"),
    ],
)
def test_apply_output_forms(router: FakeRouter, mesh: Mesh, format_: str, expected: str) -> None:
    router.answers["Apply"] = accept_all()
    assert mesh("apply", "-f", "-", "-o", format_, stdin=manifest("a")).stdout == expected


def test_apply_as_json(router: FakeRouter, mesh: Mesh) -> None:
    router.answers["Apply"] = accept_all()
    shown = json.loads(mesh("apply", "-f", "-", "-o", "json", stdin=manifest("a")).stdout)
    assert shown == [{"name": "a", "model_id": "a__isvc-0123456789", "action": "created"}]


@pytest.mark.parametrize(
    "file", ["/no/such/file.yaml", "empty"], ids=["not there", "a folder without manifests"]
)
def test_apply_of_nothing_is_a_usage_error(mesh: Mesh, tmp_path: Path, file: str) -> None:
    (tmp_path / "empty").mkdir()
    result = mesh("apply", "-f", str(tmp_path / file))
    assert result.exit_code == 2 and result.stderr.startswith("error: -f ")


def test_apply_waits_until_all_are_loaded(router: FakeRouter, mesh: Mesh) -> None:
    router.answers["Apply"] = accept_all()
    answers = iter([[row("a", "LOADING")], [row("a", "LOADING")], [row("a", "LOADED")]])
    router.answers["List"] = lambda request: pb.ListResponse(
        items_json=json.dumps(next(answers))
    ).SerializeToString()
    result = mesh("apply", "-f", "-", "--wait", stdin=manifest("a"))
    assert result.exit_code == 0 and result.stderr == "1 loaded\n"
    assert len(router.requests("List")) == 3


def test_apply_that_waits_tells_why_a_load_failed(router: FakeRouter, mesh: Mesh) -> None:
    router.answers["Apply"] = accept_all()
    router.rows["models"] = [row("a", "LOADING_FAILED", failure="no such bucket: b")]
    result = mesh("apply", "-f", "-", "--wait", stdin=manifest("a"))
    assert result.exit_code == 1
    assert "error: a: did not load: no such bucket: b" in result.stderr


def test_apply_gives_up_waiting_with_its_own_exit_code(router: FakeRouter, mesh: Mesh) -> None:
    router.answers["Apply"] = accept_all()
    router.rows["models"] = [row("a", "LOADING")]
    result = mesh("apply", "-f", "-", "--wait", "--timeout", "200ms", stdin=manifest("a"))
    assert result.exit_code == 4 and "not loaded after 0.2 s" in result.stderr


@pytest.mark.parametrize(
    ("fields", "begun", "expected"),
    [
        ({"state": "LOADED"}, False, "loaded"),
        ({"state": "NOT_LOADED"}, False, "pending"),
        ({"state": "NOT_LOADED"}, True, "idle"),
        ({"state": "LOADING"}, True, "pending"),
        ({"state": "LOADING_FAILED", "failure": "x"}, False, "failed"),
        ({"state": "LOADED", "model_id": "m1", "target_model_id": "m2"}, True, "pending"),
        (
            {
                "state": "LOADED",
                "model_id": "m1",
                "target_model_id": "m2",
                "target_failure": "x",
            },
            False,
            "failed",
        ),
    ],
)
def test_when_an_applied_model_has_come_to_rest(
    fields: dict[str, str], begun: bool, expected: str
) -> None:
    state = settle([ModelRow("a", **fields)], frozenset({"a"}), begun=begun)  # type: ignore[arg-type]
    found = {
        name for name in ("loaded", "failed", "idle", "pending") if "a" in getattr(state, name)
    }
    assert found == {expected}


def test_a_name_that_is_not_listed_yet_is_pending() -> None:
    assert settle([], frozenset({"a"}), begun=True).pending == {"a"}


def test_get_models_is_a_sorted_table(router: FakeRouter, mesh: Mesh) -> None:
    router.rows["models"] = [
        row("b", "LOADING_FAILED", failure="long\nstory"),
        row("a", size_bytes=2048, copies_loaded=2, copies_loading=1, model_type="onnx"),
    ]
    lines = mesh("get", "models").stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "TYPE", "COPIES", "SIZE", "LAST", "USED", "AGE"]
    assert lines[1].split() == ["a", "LOADED", "onnx", "2+1", "2", "KiB", "-", "-"]
    assert lines[2].split()[:2] == ["b", "LOADING_FAILED"]
    wide = mesh("get", "models", "-o", "wide").stdout.splitlines()
    assert len(wide) == 3 and "long story" in wide[2]


def test_get_instances_and_its_names(router: FakeRouter, mesh: Mesh) -> None:
    router.rows["instances"] = [
        {"instance_id": "i-1", "state": "READY", "capacity_bytes": 1 << 30, "load_slots": 2}
    ]
    assert "i-1" in mesh("get", "instances").stdout and "1 GiB" in mesh("get", "instances").stdout
    assert mesh("get", "instances", "-o", "name").stdout == "instance/i-1\n"


@pytest.mark.parametrize("parse", [json.loads, yaml.safe_load], ids=["json", "yaml"])
def test_get_structured_keeps_every_field(
    router: FakeRouter, mesh: Mesh, parse: Callable[[str], Any]
) -> None:
    router.rows["models"] = [row("a", from_a_newer_router=1), row("b")]
    format_ = "json" if parse is json.loads else "yaml"
    assert parse(mesh("get", "models", "-o", format_).stdout) == router.rows["models"]
    assert parse(mesh("get", "models", "a", "-o", format_).stdout) == router.rows["models"][0]


def test_get_of_a_name_that_is_not_there(router: FakeRouter, mesh: Mesh) -> None:
    router.rows["models"] = [row("a")]
    result = mesh("get", "models", "a", "zzz")
    assert result.exit_code == 1
    assert result.stderr == "error: not found: zzz; see `mesh get models`\n"
    assert "a " in result.stdout


def test_get_of_nothing_says_so_on_stderr(mesh: Mesh) -> None:
    result = mesh("get", "models")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no models\n")


def test_get_of_an_unknown_kind(mesh: Mesh) -> None:
    result = mesh("get", "fish")
    assert result.exit_code == 2 and "one of models, instances, isvc" in result.stderr


DESCRIPTION: dict[str, Any] = {
    "row": row("iris", "LOADING_FAILED", failure="corrupt artifact"),
    "active": {
        "model_id": "iris__isvc-0",
        "state": "LOADING_FAILED",
        "path": "s3://b/iris",
        "copies": [
            {"instance_id": "i-1", "state": "LOADED", "size_bytes": 1024, "details": {"queue": 3}}
        ],
        "failures": [
            {"instance_id": "i-2", "code": "FAILED_PRECONDITION", "message": "not an ONNX file"}
        ],
    },
}


def test_describe_tells_copies_and_causes(router: FakeRouter, mesh: Mesh) -> None:
    router.answers["Describe"] = lambda request: pb.DescribeResponse(
        json=json.dumps(DESCRIPTION)
    ).SerializeToString()
    text = mesh("describe", "model", "iris").stdout
    assert "Failure:    corrupt artifact" in text
    assert "i-2: FAILED_PRECONDITION: not an ONNX file" in text
    assert "i-1" in text and "queue=3" in text and "s3://b/iris" in text
    assert json.loads(mesh("describe", "model", "iris", "-o", "json").stdout) == DESCRIPTION
    assert yaml.safe_load(mesh("describe", "model", "iris", "-o", "yaml").stdout) == DESCRIPTION
    assert pb.DescribeRequest.FromString(router.requests("Describe")[0]).name == "iris"


def test_describe_of_an_unknown_model(router: FakeRouter, mesh: Mesh) -> None:
    router.answers["Describe"] = lambda request: (grpc.StatusCode.NOT_FOUND, "no model 'zzz'")
    result = mesh("describe", "model", "zzz")
    assert (result.exit_code, result.stderr) == (1, "error: NOT_FOUND: no model 'zzz'\n")


def test_explain_shows_the_choice_and_the_candidates(router: FakeRouter, mesh: Mesh) -> None:
    answer = {
        "name": "iris",
        "model_id": "iris__isvc-0",
        "action": "load",
        "instance_id": "i-2",
        "reason": "most_free",
        "runner_up": "i-1",
        "candidates": [
            {"instance_id": "i-2", "reason": "512 MiB free", "chosen": True, "rank": 1},
            {"instance_id": "i-3", "reason": "draining"},
        ],
    }
    router.answers["Explain"] = lambda request: pb.ExplainResponse(
        json=json.dumps(answer)
    ).SerializeToString()
    text = mesh("explain", "iris").stdout
    assert text.splitlines()[0] == "iris -> iris__isvc-0: load i-2"
    assert "most_free" in text and "->  i-2" in text and "no  i-3  draining" in text
    assert json.loads(mesh("explain", "iris", "-o", "json").stdout) == answer


@pytest.mark.parametrize("format_", ["text", "json", "yaml"])
def test_explain_of_an_unknown_name_explains_and_ends_with_1(
    router: FakeRouter, mesh: Mesh, format_: str
) -> None:
    router.answers["Explain"] = lambda request: pb.ExplainResponse(
        json='{"name": "zzz", "action": "not_found", "reason": "unknown_name"}'
    ).SerializeToString()
    result = mesh("explain", "zzz", "-o", format_)
    assert result.exit_code == 1 and "unknown_name" in result.stdout
    assert result.stderr == "error: not found: zzz; see `mesh get models`\n"


def test_delete_says_what_went_and_what_was_not_there(router: FakeRouter, mesh: Mesh) -> None:
    router.answers["Delete"] = lambda request: pb.DeleteResponse(
        existed=pb.DeleteRequest.FromString(request).name == "a"
    ).SerializeToString()
    result = mesh("delete", "model", "zzz", "a")
    assert (result.exit_code, result.stdout) == (1, f"{ISVC}/a deleted\n")
    assert result.stderr == "error: not found: zzz; see `mesh get models`\n"
    assert mesh("delete", "model", "zzz", "--ignore-not-found").exit_code == 0


def test_delete_takes_only_models(mesh: Mesh) -> None:
    assert mesh("delete", "instance", "i-1").exit_code == 2


# ---- what a placement goes by --------------------------------------------------------------------

SHORTFALL = "1 missing, no_room: nothing rests for longer"


@pytest.mark.parametrize(
    ("sentence", "fields", "column", "shown"),
    [
        ("copies that lack, and why", {"copies_wanted": 2, "copies_loaded": 1,
         "shortfall": SHORTFALL}, "LACKS", f"1 of 2: {SHORTFALL}"),
        ("copies that are on their way", {"copies_wanted": 2, "copies_loaded": 1}, "LACKS",
         "1 of 2"),
        ("copies enough", {"copies_wanted": 2, "copies_loaded": 2}, "LACKS", "-"),
        ("no number is wanted", {}, "LACKS", "-"),
        ("a pinned copy that is not kept yet", {"copies_wanted": 1, "copies_loaded": 1,
         "shortfall": SHORTFALL}, "LACKS", f"1 of 1: {SHORTFALL}"),
        ("unloaded after a while", {"idle_unload_ms": 1_800_000}, "IDLE UNLOAD", "30m"),
        ("never unloaded", {"idle_unload_ms": 0}, "IDLE UNLOAD", "never"),
        ("unloaded when the policy says", {}, "IDLE UNLOAD", "as the policy has it"),
        ("labels that it needs and likes", {"required_labels": ["gpu"],
         "preferred_labels": ["ssd"]}, "LABELS", "gpu, ssd (preferred)"),
        ("no labels", {}, "LABELS", "-"),
    ],
)  # fmt: skip
def test_wide_models_show(
    router: FakeRouter, mesh: Mesh, sentence: str, fields: dict[str, Any], column: str, shown: str
) -> None:
    router.rows["models"] = [row("iris", **fields)]
    head, line = mesh("get", "models", "-o", "wide").stdout.splitlines()
    assert line[head.index(column) :].split("  ")[0] == shown


@pytest.mark.parametrize(
    ("sentence", "fields", "column", "shown"),
    [
        ("one that does not answer", {"passed_over": True}, "STATE", "READY (passed over)"),
        ("one that does", {}, "STATE", "READY"),
        ("its zone", {"zone": "z1"}, "ZONE", "z1"),
        ("its labels", {"labels": ["gpu", "ssd"]}, "LABELS", "gpu,ssd"),
        ("its group and generation", {"group": "g", "replica_set": "r2"}, "GROUP", "g/r2"),
        ("the worth of what would go", {"victim_score": 12.345}, "VICTIM SCORE", "12.3"),
        ("nothing that could go", {}, "VICTIM SCORE", "-"),
    ],
)
def test_wide_instances_show(
    router: FakeRouter, mesh: Mesh, sentence: str, fields: dict[str, Any], column: str, shown: str
) -> None:
    router.rows["instances"] = [{"instance_id": "i-1", "state": "READY", **fields}]
    head, line = mesh("get", "instances", "-o", "wide").stdout.splitlines()
    assert line[head.index(column) :].split("  ")[0] == shown


def test_describe_shows_pins_labels_and_what_lacks(router: FakeRouter, mesh: Mesh) -> None:
    view = {
        "row": row("iris", copies_wanted=1, copies_loaded=1, shortfall=SHORTFALL),
        "active": {
            "model_id": "iris__isvc-0",
            "pinned": True,
            "idle_unload_ms": 1_800_000,
            "required_labels": ["gpu"],
            "copies": [{"instance_id": "i-1", "state": "LOADED", "pinned": True}],
        },
    }
    reply = pb.DescribeResponse(json=json.dumps(view)).SerializeToString()
    router.answers["Describe"] = lambda request: reply
    text = mesh("describe", "model", "iris").stdout
    for line in ("Lacks:      1 of 1", "Idle unload:  30m", "Wants labels: gpu", ", pinned\n"):
        assert line in text


def test_explain_shows_zones_marks_and_what_lacks(router: FakeRouter, mesh: Mesh) -> None:
    view = {
        "name": "iris",
        "model_id": "iris__isvc-0",
        "action": "wait",
        "candidates": [
            {"instance_id": "i-1", "reason": "9 bytes free; hot", "rank": 1, "zone": "z1"},
            {"instance_id": "i-2", "reason": "draining"},
        ],
        "shortfall": SHORTFALL,
    }
    reply = pb.ExplainResponse(json=json.dumps(view)).SerializeToString()
    router.answers["Explain"] = lambda request: reply
    lines = mesh("explain", "iris").stdout.splitlines()
    assert lines[0] == "iris -> iris__isvc-0: wait"
    assert "  1.  i-1 in z1  9 bytes free; hot" in lines
    assert f"Lacks:      {SHORTFALL}" in lines
