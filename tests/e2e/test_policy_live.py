"""Thresholds and constraints that are set while the mesh runs, and what its processes make of them.

One mesh of two instances; each test begins and ends without overrides. Its etcd is the tests' own,
so that one of them can add an instance with a label.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.asking import LABELS, Asker, eventually, flowers, isvc
from tests.e2e.conftest import ended_well
from tests.e2e.processes import serving
from tests.etcd_server import EtcdServer
from tests.up.live import LiveMesh

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

# Looks are frequent from the start: a new period holds from the next look on.
OFTEN = "scale_sweep_ms=200,leader_sweep_ms=200,advert_min_interval_ms=50"


class Rig:
    def __init__(self, mesh: LiveMesh, etcd: str, samples: Path, folder: Path) -> None:
        self.mesh = mesh
        self.etcd = etcd
        self.samples = samples
        self.folder = folder
        self.ask = Asker(mesh.address)

    def command(self, *args: str, stdin: str | None = None) -> str:
        ended = self.mesh.mesh(*args, stdin=stdin)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def override(self, **thresholds: int) -> None:
        self.command("policy", "set", *(f"{name}={value}" for name, value in thresholds.items()))

    def apply(self, name: str, **annotations: str) -> None:
        told = {f"mesh.serving/{key.replace('_', '-')}": v for key, v in annotations.items()}
        uri = (self.samples / "iris-0001").as_uri()
        self.ask.apply(isvc(name, uri, annotations=told))

    def copies(self, name: str) -> int:
        return int(self.ask.rows()[name]["copies_loaded"])

    def holders(self, name: str) -> list[str]:
        return list(self.ask.rows()[name]["instance_ids"])

    def decided(self, name: str) -> set[tuple[str, str]]:
        """(kind, reason) of what was decided about it, as `mesh explain --decisions` tells."""
        rows = json.loads(self.command("explain", "--decisions", name, "-o", "json"))["rows"]
        return {(row["kind"], row["reason"]) for row in rows}


@pytest.fixture(scope="module")
def running(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("live")
    with EtcdServer() as etcd:
        flags = ("--etcd", etcd.endpoint, "--file-root", str(samples), "--policy", OFTEN)
        mesh = LiveMesh(folder / "data", *flags)
        with ended_well(mesh):
            mesh.ready()
            rig = Rig(mesh, etcd.endpoint, samples, folder)
            with rig.ask:
                yield rig


@pytest.fixture
def rig(running: Rig) -> Iterator[Rig]:
    yield running
    running.command("policy", "unset", "--all")
    for name in running.ask.rows():
        running.ask.delete(name)


def test_a_model_that_is_asked_hard_gets_a_second_copy_and_loses_it_at_rest(rig: Rig) -> None:
    rig.apply("busy")
    rig.override(scale_up_requests_per_minute=60, scale_up_cooldown_ms=0)

    def asked_hard() -> bool:
        assert all(rig.ask.labels("busy") == LABELS for _ in range(20))
        return rig.copies("busy") == 2

    eventually(asked_hard, "a second copy")
    assert ("scale_up", "rate") in rig.decided("busy")
    rig.override(
        second_copy_idle_ms=1_000, second_copy_idle_short_ms=1_000, scale_down_cooldown_ms=0
    )
    eventually(lambda: rig.copies("busy") == 1, "a single copy")
    assert ("scale_down", "idle") in rig.decided("busy")
    assert rig.ask.labels("busy") == LABELS


@pytest.mark.parametrize("whose", ["the model's own time-out", "the mesh's time-out"])
def test_a_model_that_rests_is_unloaded_and_comes_back_when_it_is_asked(
    rig: Rig, whose: str
) -> None:
    if whose == "the model's own time-out":
        rig.apply("resting", idle_unload_after="500ms")
    else:
        rig.apply("resting")
        rig.apply("kept", idle_unload_after="0")
        assert rig.ask.labels("kept") == LABELS
    assert rig.ask.labels("resting") == LABELS
    if whose == "the mesh's time-out":
        rig.override(idle_unload_ms=500)
    eventually(lambda: rig.copies("resting") == 0, "the end of a copy that rests")
    assert ("unload", "idle") in rig.decided("resting")
    assert rig.ask.labels("resting") == LABELS
    if whose == "the mesh's time-out":
        assert rig.copies("kept") == 1


def test_what_was_used_comes_back_ahead_of_requests_when_all_instances_are_new(rig: Rig) -> None:
    rig.override(proactive_sweep_ms=200, proactive_quiet_ms=0, drain_recent_ms=0)
    rig.apply("used")
    rig.apply("never-used")
    assert rig.ask.labels("used") == LABELS
    before = set(rig.ask.rows("instances"))
    for name, pid in rig.mesh.children().items():
        if name.startswith("instance"):
            os.kill(pid, signal.SIGTERM)

    def all_new() -> bool:
        now: dict[str, Any] = rig.ask.rows("instances")
        return len(now) == 2 and not before & now.keys()

    eventually(all_new, "two new instances")
    eventually(lambda: rig.copies("used") == 1, "a copy that nobody asked for")
    assert ("proactive", "recently_used") in rig.decided("used")
    assert rig.copies("never-used") == 0


def test_models_go_only_where_their_labels_are(rig: Rig) -> None:
    for name in ("by-format-1", "by-format-2"):
        rig.apply(name)
    rig.command("type-constraints", "set", "-f", "-", stdin="{onnx: {required: [gpu]}}")
    eventually(
        lambda: "labels_missing" in rig.command("explain", "by-format-1"), "the constraint's news"
    )
    code, message = rig.ask.refused(flowers("by-format-1"))
    assert "gpu" in message, (code, message)
    flags = ("--label", "gpu,ssd", "--name", "labelled", "--file-root", str(rig.samples))
    cache = ("--cache-dir", str(rig.folder / "labelled"))
    with serving(rig.folder, "instance", rig.etcd, *flags, *cache) as labelled:
        labelled.ready()
        eventually(lambda: len(rig.ask.rows("instances")) == 3, "the labelled instance")
        (alone,) = (name for name in rig.ask.rows("instances") if name.startswith("labelled"))
        for name in ("by-format-1", "by-format-2"):
            assert rig.ask.labels(name) == LABELS
            assert rig.holders(name) == [alone]
        assert "labels_missing" in rig.command("explain", "by-format-1")
        rig.command("type-constraints", "set", "-f", "-", stdin="{}")
        for number in range(3):
            rig.apply(f"by-model-{number}", required_labels="ssd")
            assert rig.ask.labels(f"by-model-{number}") == LABELS
            assert rig.holders(f"by-model-{number}") == [alone]
    eventually(lambda: len(rig.ask.rows("instances")) == 2, "the end of the labelled instance")
