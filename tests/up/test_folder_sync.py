"""The watched folder on real files, against a mesh that is a dictionary."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from mesh.folder_sync import Applied, FolderSync, SyncRefused, SyncUnavailable

LATER_NS = 10**20  # every file is old at that time


@dataclass(slots=True)
class FakeMesh:
    """Registers by name; ``faults`` holds what to raise for a name, or for "*" all."""

    models: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    faults: dict[str, Exception] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def apply(self, manifest_json: str) -> Applied:
        name = json.loads(manifest_json)["metadata"]["name"]
        with self.lock:
            self.calls.append(f"apply {name}")
            self._fault(name)
            before = self.models.get(name)
            self.models[name] = manifest_json
        actions = {None: "created", manifest_json: "unchanged"}
        return Applied(name, actions.get(before, "configured"), ("spec.x: unknown",))

    def delete(self, name: str) -> None:
        with self.lock:
            self.calls.append(f"delete {name}")
            self._fault(name)
            self.models.pop(name, None)

    def _fault(self, name: str) -> None:
        for key in (name, "*"):
            if key in self.faults:
                raise self.faults[key]


@dataclass(slots=True)
class Told:
    problems: list[str] = field(default_factory=list)
    deletions: list[str] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)

    def applied(self, source: str, result: Applied) -> None: ...

    def deleted(self, name: str) -> None:
        self.deletions.append(name)

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def progress(self, done: int, total: int) -> None:
        self.counts.append((done, total))


@dataclass(slots=True)
class World:
    root: Path
    mesh: FakeMesh = field(default_factory=FakeMesh)
    told: Told = field(default_factory=Told)

    @property
    def folder(self) -> Path:
        return self.root / "models"

    def sync(self) -> FolderSync:
        return FolderSync(self.folder, self.root / "memory.json", self.mesh, self.told)

    def write(self, file: str, *names: str, uri: str = "file:///m/x") -> Path:
        path = self.folder / file
        path.write_text("---\n".join(manifest(name, uri) for name in names))
        return path


def manifest(name: str, uri: str = "file:///m/x") -> str:
    return (
        "apiVersion: serving.kserve.io/v1beta1\n"
        "kind: InferenceService\n"
        f"metadata: {{name: {name}}}\n"
        "spec: {predictor: {model: {modelFormat: {name: onnx}, "
        f"storageUri: '{uri}'}}}}}}\n"
    )


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "models").mkdir()
    return World(tmp_path)


def step(sync: FolderSync) -> bool:
    return sync.step(LATER_NS)


def test_applies_manifests_and_models_and_counts_along(world: World) -> None:
    world.write("pair.yaml", "one", "two")
    (world.folder / "three").mkdir()
    (world.folder / "three" / "model.onnx").write_bytes(b"x")
    (world.folder / "four.skops").write_bytes(b"x")
    (world.folder / "README.md").write_text("not a model")
    sync = world.sync()
    assert step(sync)
    assert sorted(world.mesh.models) == ["four", "one", "three", "two"]
    assert sync.names == frozenset(world.mesh.models)
    spec = json.loads(world.mesh.models["three"])["spec"]["predictor"]["model"]
    assert spec["storageUri"] == (world.folder / "three").as_uri()
    assert world.told.problems == []
    assert world.told.counts[-1] == (4, 4)


def test_a_json_file_is_a_manifest_or_an_xgboost_model_by_its_first_bytes(world: World) -> None:
    (world.folder / "trees.json").write_text('{"learner":{},"version":[3,2,0]}')
    (world.folder / "one.json").write_text(json.dumps(yaml.safe_load(manifest("one"))))
    assert step(world.sync())
    assert sorted(world.mesh.models) == ["one", "trees"]
    spec = json.loads(world.mesh.models["trees"])["spec"]["predictor"]["model"]
    assert spec["modelFormat"] == {"name": "xgboost"}


def test_applies_nothing_twice_and_changes_again(world: World) -> None:
    path = world.write("one.yaml", "one")
    sync = world.sync()
    step(sync)
    step(sync)
    assert world.mesh.calls == ["apply one"]
    world.write("one.yaml", "one", uri="file:///m/other")
    os.utime(path, ns=(1, 1))
    step(sync)
    assert world.mesh.calls == ["apply one", "apply one"]
    assert "other" in world.mesh.models["one"]


def test_a_replaced_model_file_is_applied_as_a_changed_resource(world: World) -> None:
    model = world.folder / "m.onnx"
    model.write_bytes(b"old")
    sync = world.sync()
    step(sync)
    before = world.mesh.models["m"]
    model.write_bytes(b"newer")
    step(sync)
    assert world.mesh.models["m"] != before


def test_deletes_what_went_and_never_what_others_applied(world: World) -> None:
    world.mesh.models["theirs"] = "{}"
    path = world.write("one.yaml", "one")
    sync = world.sync()
    step(sync)
    path.unlink()
    assert step(sync)
    assert world.mesh.models == {"theirs": "{}"}
    assert world.told.deletions == ["one"]


def test_a_document_that_left_its_file_is_deleted(world: World) -> None:
    world.write("pair.yaml", "one", "two")
    sync = world.sync()
    step(sync)
    world.write("pair.yaml", "two")
    step(sync)
    assert sorted(world.mesh.models) == ["two"]


def test_what_went_while_nobody_watched_is_deleted_at_the_next_start(world: World) -> None:
    path = world.write("one.yaml", "one")
    world.write("two.yaml", "two")
    step(world.sync())
    path.unlink()
    step(world.sync())
    assert sorted(world.mesh.models) == ["two"]


def test_a_folder_that_is_gone_as_a_whole_deletes_nothing(world: World) -> None:
    world.write("one.yaml", "one")
    sync = world.sync()
    step(sync)
    world.folder.rename(world.root / "away")
    assert not step(sync)
    assert not step(sync)
    assert "one" in world.mesh.models
    assert len(world.told.problems) == 1
    (world.root / "away").rename(world.folder)
    assert step(sync)
    assert "one" in world.mesh.models


def test_a_bad_file_is_one_line_and_the_others_go_on(world: World) -> None:
    (world.folder / "bad.yaml").write_text("a: [")
    (world.folder / "empty").mkdir()
    (world.folder / "empty" / "notes.txt").write_text("no model here")
    world.write("good.yaml", "good")
    sync = world.sync()
    step(sync)
    step(sync)
    assert sorted(world.mesh.models) == ["good"]
    assert len(world.told.problems) == 2
    assert "bad.yaml: " in world.told.problems[0]
    assert "model file" in world.told.problems[1]


def test_a_bad_edit_keeps_what_was_applied_before(world: World) -> None:
    world.write("one.yaml", "one")
    sync = world.sync()
    step(sync)
    (world.folder / "one.yaml").write_text("a: [")
    step(sync)
    assert "one" in world.mesh.models and len(world.told.problems) == 1


def test_a_refused_resource_is_told_once_and_tried_again_when_it_changed(world: World) -> None:
    path = world.write("one.yaml", "one")
    world.mesh.faults["one"] = SyncRefused("spec.predictor: what is this")
    sync = world.sync()
    assert step(sync) and step(sync)
    assert world.mesh.calls == ["apply one"]
    assert len(world.told.problems) == 1 and "what is this" in world.told.problems[0]
    world.mesh.faults.clear()
    path.write_text(path.read_text() + "\n")
    step(sync)
    assert "one" in world.mesh.models


def test_a_mesh_that_does_not_answer_is_asked_again_and_told_of_once(world: World) -> None:
    for number in range(50):
        world.write(f"{number}.yaml", f"m{number}")
    world.mesh.faults["*"] = SyncUnavailable("cannot reach the mesh")
    sync = world.sync()
    assert not step(sync)
    assert not step(sync)
    assert world.told.problems == ["cannot reach the mesh"]
    assert len(world.mesh.calls) < 50, "one refusal to answer ends the step"
    world.mesh.faults.clear()
    assert step(sync)
    assert len(world.mesh.models) == 50


def test_a_delete_that_is_not_answered_is_tried_again(world: World) -> None:
    path = world.write("one.yaml", "one")
    sync = world.sync()
    step(sync)
    path.unlink()
    world.mesh.faults["*"] = SyncUnavailable("away")
    assert not step(sync)
    world.mesh.faults.clear()
    assert step(sync)
    assert world.mesh.models == {}


def test_a_name_in_two_files_is_told(world: World) -> None:
    world.write("a.yaml", "same")
    world.write("b.yaml", "same")
    step(world.sync())
    assert world.told.problems == ["b.yaml: same stands in a.yaml too; the last one counts"]


def test_a_half_written_file_waits(world: World) -> None:
    path = world.write("one.yaml", "one")
    written_ns = path.stat().st_mtime_ns
    sync = world.sync()
    assert not sync.step(written_ns)
    assert world.mesh.models == {}
    assert sync.step(written_ns)
    assert sorted(world.mesh.models) == ["one"]


def test_hidden_and_back_up_files_are_no_entries(world: World) -> None:
    for name in (".one.yaml.swp", "one.yaml~", ".hidden.yaml"):
        world.write(name, "one")
    assert step(world.sync())
    assert world.mesh.calls == []


@pytest.mark.parametrize(
    "spoil",
    [lambda path: path.write_text("{"), lambda path: path.write_text('{"names": 3}')],
    ids=["not JSON", "not names"],
)
def test_a_broken_memory_starts_empty(world: World, spoil: Callable[[Path], None]) -> None:
    spoil(world.root / "memory.json")
    world.write("one.yaml", "one")
    assert step(world.sync())
    assert sorted(world.mesh.models) == ["one"]


# ---- resources that are no models ----------------------------------------------------------------


def write_runtime(world: World, file: str = "z-runtime.yaml", formats: str = "onnx") -> None:
    (world.folder / file).write_text(
        "apiVersion: serving.kserve.io/v1alpha1\nkind: ServingRuntime\nmetadata: {name: rt}\n"
        f"spec: {{supportedModelFormats: [{{name: {formats}}}]}}\n"
    )


def test_what_others_lean_on_is_applied_first(world: World) -> None:
    world.write("a.yaml", "one", "two")
    write_runtime(world)
    step(world.sync())
    assert world.mesh.calls[0] == "apply rt"
    assert sorted(world.mesh.calls[1:]) == ["apply one", "apply two"]


def test_a_runtime_that_comes_later_has_what_was_refused_tried_again(world: World) -> None:
    world.write("one.yaml", "one")
    world.write("two.yaml", "two")
    sync = world.sync()
    world.mesh.faults["one"] = SyncRefused("NoSupportingRuntime: no runtime")
    step(sync)
    assert world.told.problems == [
        f"{world.folder}/one.yaml: inferenceservice.serving.kserve.io/one: "
        "NoSupportingRuntime: no runtime"
    ]
    world.mesh.calls.clear()
    write_runtime(world)
    assert not step(sync)
    del world.mesh.faults["one"]
    step(sync)
    assert world.mesh.calls == ["apply rt", "apply one"]
    assert sync.step() and world.mesh.calls == ["apply rt", "apply one"]


def test_names_are_those_of_models_alone(world: World) -> None:
    class Kinds(FakeMesh):
        def apply(self, manifest_json: str) -> Applied:
            kind = json.loads(manifest_json)["kind"]
            found = FakeMesh.apply(self, manifest_json)
            name = found.name if kind == "InferenceService" else f"{kind}/{found.name}"
            return Applied(name, found.action)

    world.mesh = Kinds()
    world.write("one.yaml", "one")
    write_runtime(world)
    sync = world.sync()
    step(sync)
    assert sync.names == {"one"}
    (world.folder / "z-runtime.yaml").unlink()
    step(sync)
    assert world.mesh.calls[-1] == "delete ServingRuntime/rt"
