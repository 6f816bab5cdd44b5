"""policy, type-constraints and explain --decisions: what is sent, what is shown, how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mesh.cli.exits import CommandError
from mesh.cli.main import app
from mesh.cli.servers import policy_from
from mesh.cli.thresholds import parse_overrides
from protos import mesh_admin_pb2 as pb
from tests.cli.conftest import Mesh
from tests.cli.fake_router import FakeRouter

READ = [
    ("a number", ["load_slots=4"], {"load_slots": 4}),
    ("a share", ["proactive_free_share=0.25"], {"proactive_free_share": 0.25}),
    ("a share as a whole number", ["proactive_free_share=1"], {"proactive_free_share": 1.0}),
    ("a share in per cent", ["proactive_free_share=10%"], {"proactive_free_share": 0.1}),
    ("a text", ["eviction_order=lru"], {"eviction_order": "lru"}),
    ("plain milliseconds", ["idle_unload_ms=250"], {"idle_unload_ms": 250}),
    ("a duration where milliseconds are meant", ["idle_unload_ms=30m"],
     {"idle_unload_ms": 1_800_000}),
    ("a size where bytes are meant", ["default_model_size_bytes=2MiB"],
     {"default_model_size_bytes": 2 << 20}),
    ("several with commas, as the environment has them", ["load_slots=4, hops_max=2", "audit_ms=9"],
     {"load_slots": 4, "hops_max": 2, "audit_ms": 9}),
    ("the last of two for one name", ["load_slots=4", "load_slots=5"], {"load_slots": 5}),
    ("a name that only a newer router knows", ["new_ms=1.5"], {"new_ms": 1.5}),
    ("what cannot be read stays, for who knows better", ["load_slots=many"],
     {"load_slots": "many"}),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "texts", "found"), READ, ids=[row[0] for row in READ])
def test_thresholds_as_people_write_them(
    sentence: str, texts: list[str], found: dict[str, object]
) -> None:
    read = parse_overrides(texts)
    assert read == found
    assert [type(value) for value in read.values()] == [type(value) for value in found.values()]


@pytest.mark.parametrize(
    "text", ["load_slots", "=4", "load_slots=", "idle_unload_ms=30x", "hot_factor=x%"]
)
def test_what_is_no_threshold_is_a_usage_error(text: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_overrides([text])
    assert caught.value.exit_code == 2


def test_policy_flags_win_over_the_older_flags_for_the_same_thing() -> None:
    policy = policy_from(1_000, ["load_slots=7"], load_slots=2, load_timeout_ms=5_000)
    assert (policy.load_slots, policy.load_timeout_ms) == (7, 5_000)
    assert (policy.load_failure_expiry_ms, policy.transient_failure_expiry_ms) == (1_000, 1_000)


@pytest.mark.parametrize("command", ["up", "router", "instance"])
def test_a_server_names_a_wrong_threshold_and_does_not_start(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--policy", "load_slot=4"])
    assert result.exit_code == 2
    assert "did you mean load_slots?" in result.stderr


@pytest.mark.parametrize("command", ["up", "router", "instance"])
def test_thresholds_come_from_the_environment_too(command: str) -> None:
    result = CliRunner().invoke(app, [command], env={"MESH_POLICY": "load_slots=4,hops_max=0"})
    assert result.exit_code == 2
    assert "policy.hops_max" in result.stderr


# ---- mesh policy ---------------------------------------------------------------------------------


def row(name: str, value: Any, source: str = "default") -> dict[str, Any]:
    return {"name": name, "value": value, "default": 2, "source": source, "unit": "",
            "expected": "a whole number", "group": "", "reason": f"Because of {name}."}  # fmt: skip


def answer_policy(router: FakeRouter, **view: Any) -> None:
    text = json.dumps({"rows": [row("load_slots", 4, "live"), row("hops_max", 2)], **view})
    reply = pb.PolicyResponse(json=text).SerializeToString()
    router.answers["GetPolicy"] = router.answers["SetPolicy"] = lambda request: reply


def sent_policy(router: FakeRouter) -> tuple[Any, list[str], bool]:
    (request,) = map(pb.SetPolicyRequest.FromString, router.requests("SetPolicy"))
    return json.loads(request.overrides_json), list(request.unset), request.reset


@pytest.mark.parametrize("command", [("policy",), ("policy", "get")])
def test_policy_lists_values_and_where_they_are_from(
    router: FakeRouter, mesh: Mesh, command: tuple[str, ...]
) -> None:
    answer_policy(router)
    result = mesh(*command)
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["NAME", "VALUE", "DEFAULT", "FROM"],
        ["load_slots", "4", "2", "live"],
        ["hops_max", "2", "2", "default"],
    ]
    assert "Because of hops_max." in mesh(*command, "-o", "wide").stdout
    assert json.loads(mesh(*command, "-o", "json").stdout)[0]["value"] == 4
    assert yaml.safe_load(mesh(*command, "-o", "yaml").stdout)[1]["name"] == "hops_max"
    assert mesh(*command, "-o", "name").stdout == "load_slots\nhops_max\n"


def test_policy_get_shows_those_that_are_named_and_misses_the_others(
    router: FakeRouter, mesh: Mesh
) -> None:
    answer_policy(router)
    result = mesh("policy", "get", "hops_max", "zzz")
    assert result.exit_code == 1
    assert "hops_max" in result.stdout and "load_slots" not in result.stdout
    assert "no threshold zzz" in result.stderr


def test_an_override_that_is_not_acted_on_is_warned_about(router: FakeRouter, mesh: Mesh) -> None:
    answer_policy(router, refused="policy.hops_max: expected 1 to 64; found 0")
    result = mesh("policy")
    assert result.exit_code == 0
    assert "not acted on: policy.hops_max" in result.stderr


def test_policy_set_sends_numbers_and_says_what_holds(router: FakeRouter, mesh: Mesh) -> None:
    answer_policy(router, warnings=["soon"])
    result = mesh("policy", "set", "load_slots=4", "idle_unload_ms=30m")
    assert (result.exit_code, result.stdout) == (0, "load_slots = 4 (live)\n")
    assert "warning: soon" in result.stderr
    assert sent_policy(router) == ({"load_slots": 4, "idle_unload_ms": 1_800_000}, [], False)


def test_policy_unset_sends_the_names(router: FakeRouter, mesh: Mesh) -> None:
    answer_policy(router)
    result = mesh("policy", "unset", "hops_max")
    assert (result.exit_code, result.stdout) == (0, "hops_max = 2 (default)\n")
    assert sent_policy(router) == ({}, ["hops_max"], False)


def test_policy_unset_all_begins_anew(router: FakeRouter, mesh: Mesh) -> None:
    answer_policy(router)
    assert mesh("policy", "unset", "--all").exit_code == 0
    assert sent_policy(router) == ({}, [], True)


@pytest.mark.parametrize(
    "arguments",
    [("set",), ("set", "load_slots"), ("set", ","), ("unset",), ("unset", "--all", "hops_max")],
)
def test_what_says_nothing_is_a_usage_error(
    router: FakeRouter, mesh: Mesh, arguments: tuple[str, ...]
) -> None:
    answer_policy(router)
    assert mesh("policy", *arguments).exit_code == 2
    assert not router.requests("SetPolicy")


# ---- mesh type-constraints -----------------------------------------------------------------------

CONSTRAINTS = {"onnx": {"required": ["gpu"], "preferred": ["a100", "ssd"]}, "sklearn": {}}


def answer_constraints(router: FakeRouter, value: Any = CONSTRAINTS) -> None:
    reply = pb.TypeConstraintsResponse(json=json.dumps(value)).SerializeToString()
    for method in ("GetTypeConstraints", "SetTypeConstraints"):
        router.answers[method] = lambda request: reply


def test_constraints_are_shown(router: FakeRouter, mesh: Mesh) -> None:
    answer_constraints(router)
    assert [line.split() for line in mesh("type-constraints").stdout.splitlines()] == [
        ["TYPE", "REQUIRED", "PREFERRED"],
        ["onnx", "gpu", "a100,ssd"],
        ["sklearn", "-", "-"],
    ]
    assert json.loads(mesh("type-constraints", "get", "-o", "json").stdout) == CONSTRAINTS
    assert yaml.safe_load(mesh("type-constraints", "-o", "yaml").stdout) == CONSTRAINTS


def test_no_constraints_are_said_so(router: FakeRouter, mesh: Mesh) -> None:
    answer_constraints(router, {})
    result = mesh("type-constraints")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "every instance" in result.stderr


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump])
def test_constraints_are_set_from_a_file(
    router: FakeRouter, mesh: Mesh, tmp_path: Path, write: Any
) -> None:
    answer_constraints(router)
    (tmp_path / "constraints").write_text(write(CONSTRAINTS))
    assert mesh("type-constraints", "set", "-f", str(tmp_path / "constraints")).exit_code == 0
    assert mesh("type-constraints", "set", "-f", "-", stdin=write(CONSTRAINTS)).exit_code == 0
    sent = map(pb.SetTypeConstraintsRequest.FromString, router.requests("SetTypeConstraints"))
    assert [json.loads(request.json) for request in sent] == [CONSTRAINTS, CONSTRAINTS]


@pytest.mark.parametrize("text", ["[1]", "{", "a: b: c"])
def test_a_file_that_holds_no_object_is_a_usage_error(
    router: FakeRouter, mesh: Mesh, text: str
) -> None:
    answer_constraints(router)
    assert mesh("type-constraints", "set", "-f", "-", stdin=text).exit_code == 2
    assert mesh("type-constraints", "set", "-f", "nowhere.yaml").exit_code == 2
    assert not router.requests("SetTypeConstraints")


# ---- mesh explain --decisions --------------------------------------------------------------------


def answer_decisions(router: FakeRouter, **view: Any) -> None:
    reply = pb.DecisionsResponse(json=json.dumps(view)).SerializeToString()
    router.answers["Decisions"] = lambda request: reply


def test_decisions_are_shown_with_who_made_them_and_who_was_not_heard(
    router: FakeRouter, mesh: Mesh
) -> None:
    answer_decisions(
        router,
        rows=[
            {"at_ms": 1, "kind": "evict", "reason": "lru", "model_id": "m", "instance_id": "i-1",
             "runner_up": "n", "detail": "made room for o", "who": "i-1"},
            {"at_ms": 1, "kind": "repair", "reason": "orphan"},
        ],
        unreachable={"i-2": "no answer within 3 s"},
        asked=2,
    )  # fmt: skip
    result = mesh("explain", "--decisions")
    assert result.exit_code == 0
    head, first, second = (line.split() for line in result.stdout.splitlines())
    assert head == ["AGE", "KIND", "MODEL", "INSTANCE", "REASON", "RUNNER-UP", "DETAIL", "WHO"]
    assert first[1:] == ["evict", "m", "i-1", "lru", "n", "made", "room", "for", "o", "i-1"]
    assert second[1:] == ["repair", "-", "-", "orphan", "-", "-", "-"]
    assert "i-2 was not heard: no answer within 3 s" in result.stderr


def test_decisions_about_a_name_of_the_last_while(router: FakeRouter, mesh: Mesh) -> None:
    answer_decisions(router)
    result = mesh("explain", "iris", "--decisions", "--limit", "7", "--since", "1h")
    assert result.exit_code == 0
    assert "no decisions about iris" in result.stderr
    mesh("explain", "--decisions", "-o", "json")
    named, all_ = map(pb.DecisionsRequest.FromString, router.requests("Decisions"))
    assert (named.name, named.limit) == ("iris", 7)
    assert named.since_ms > 0
    assert (all_.name, all_.limit, all_.since_ms) == ("", 50, 0)


def test_explain_wants_a_name_or_the_decisions(router: FakeRouter, mesh: Mesh) -> None:
    result = mesh("explain")
    assert result.exit_code == 2
    assert "--decisions" in result.stderr
