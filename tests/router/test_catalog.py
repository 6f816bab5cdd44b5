"""Writes of the registry: what is compared, and what a lost race does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from mesh import registry
from mesh.catalog import Catalog, is_applied
from mesh.core.errors import AlreadyExists, FailedPrecondition, Unavailable
from mesh.core.types import FailureRecord, ModelRecord, VModelRecord
from mesh.core.view import ClusterView
from mesh.manifest import AppliedModel
from mesh.store.api import Put
from mesh.store.memory import MemoryStore

NOW_MS = 1_000_000


class Desk:
    """A catalog, and somebody else who writes into the same store."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.view = ClusterView()
        self.catalog = Catalog(self.store, self.view, now_ms=lambda: NOW_MS)

    def write(self, *records: Any) -> None:
        """By somebody else; the view has not heard of it."""
        puts = [Put(registry.key_of(r), registry.encode(r)) for r in records]
        self.store.server.apply(puts)

    def see(self, *records: Any) -> None:
        """Written, and seen by the watch."""
        self.write(*records)
        for record in records:
            match record:
                case ModelRecord():
                    self.view.put_model(record)
                case VModelRecord():
                    self.view.put_vmodel(record)
                case FailureRecord():
                    self.view.put_failure(record)
        self.view.advance(self.store.server.revision)

    def stored(self, key: str) -> Any:
        item = self.store.server.get(key)
        return None if item is None else registry.decode(key, item.value)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    yield desk
    await desk.store.close()


def applied(name: str, model_id: str, manifest: str = "{}", **model: Any) -> AppliedModel:
    record = ModelRecord(model_id, "onnx", auto_delete=True, created_at_ms=NOW_MS, **model)
    alias = VModelRecord(name, model_id, model_id, owner="isvc", manifest=manifest)
    return AppliedModel(name, "", record, alias)


async def test_apply_writes_the_model_and_the_alias(desk: Desk) -> None:
    assert await desk.catalog.apply(applied("iris", "iris-1")) == "created"
    assert desk.stored("vmodels/iris").active_model_id == "iris-1"
    assert desk.stored("models/iris-1").model_type == "onnx"
    assert desk.view.resolve("iris").model_id == "iris-1"  # type: ignore[union-attr]


async def test_a_changed_spec_moves_only_the_target(desk: Desk) -> None:
    await desk.catalog.apply(applied("iris", "iris-1", "1"))
    assert await desk.catalog.apply(applied("iris", "iris-2", "2")) == "configured"
    alias = desk.stored("vmodels/iris")
    assert (alias.active_model_id, alias.target_model_id) == ("iris-1", "iris-2")
    assert alias.manifest == "2"


async def test_a_new_target_forgets_the_failure_of_the_last_one(desk: Desk) -> None:
    desk.see(
        ModelRecord("iris-1", "onnx"),
        VModelRecord("iris", "iris-1", "iris-2", owner="isvc", failed="corrupt"),
    )
    await desk.catalog.apply(applied("iris", "iris-3", "3"))
    assert desk.stored("vmodels/iris").failed == ""


async def test_what_the_mesh_has_learnt_of_a_model_stays(desk: Desk) -> None:
    await desk.catalog.apply(applied("iris", "iris-1", "1"))
    desk.write(ModelRecord("iris-1", "onnx", size_bytes_measured=77, auto_delete=True))
    await desk.catalog.apply(applied("iris", "iris-1", "2", min_copies=3))
    model = desk.stored("models/iris-1")
    assert (model.size_bytes_measured, model.min_copies) == (77, 3)


async def test_where_a_model_may_be_changes_without_loading_it_anew(desk: Desk) -> None:
    await desk.catalog.apply(applied("iris", "iris-1", "1"))
    changed = {
        "idle_unload_ms": 5_000,
        "required_labels": ("gpu",),
        "preferred_labels": ("big",),
    }
    await desk.catalog.apply(applied("iris", "iris-1", "2", **changed))
    model = desk.stored("models/iris-1")
    assert {name: getattr(model, name) for name in changed} == changed


async def test_an_alias_of_another_owner_is_not_taken(desk: Desk) -> None:
    desk.write(VModelRecord("iris", "x", "x", owner="ksp"))
    with pytest.raises(AlreadyExists, match="'ksp'"):
        await desk.catalog.apply(applied("iris", "iris-1"))


async def test_a_write_whose_answer_was_lost_may_be_repeated(desk: Desk) -> None:
    await desk.catalog.apply(applied("iris", "iris-1"))
    assert await desk.catalog.apply(applied("iris", "iris-1")) == "unchanged"


async def test_a_race_for_a_name_ends_with_both_applied_in_order(desk: Desk) -> None:
    """Somebody else's alias appears between our read and our write."""

    class Raced(Catalog):
        raced = False

        async def model(self, model_id: str) -> Any:
            if not self.raced:
                self.raced = True
                desk.write(
                    ModelRecord("iris-0", "onnx"),
                    VModelRecord("iris", "iris-0", "iris-0", owner="isvc", manifest="0"),
                )
            return await super().model(model_id)

    catalog = Raced(desk.store, desk.view, now_ms=lambda: NOW_MS)
    assert await catalog.apply(applied("iris", "iris-1", "1")) == "configured"
    alias = desk.stored("vmodels/iris")
    assert (alias.active_model_id, alias.target_model_id) == ("iris-0", "iris-1")


async def test_a_name_that_never_holds_still_is_given_up(desk: Desk) -> None:
    class Raced(Catalog):
        async def model(self, model_id: str) -> Any:
            there = await super().model(model_id)
            desk.write(ModelRecord(model_id, "onnx", last_used_at_ms=there.mod_revision))
            return there

    desk.write(ModelRecord("m", "onnx"))
    with pytest.raises(Unavailable, match="changed by others"):
        await Raced(desk.store, desk.view, now_ms=lambda: NOW_MS).unregister("m")
    assert desk.stored("models/m") is not None


async def test_unregister_looks_at_the_store_and_not_at_an_old_view(desk: Desk) -> None:
    desk.see(ModelRecord("m", "onnx"), VModelRecord("name", "m", "m"))
    with pytest.raises(FailedPrecondition, match="'name'"):
        await desk.catalog.unregister("m")
    await desk.store.delete("vmodels/name")  # the view has not heard of it
    assert await desk.catalog.unregister("m")
    assert not await desk.catalog.unregister("m")


async def test_failures_go_with_their_model(desk: Desk) -> None:
    failure = FailureRecord("m", "pod", "UNAVAILABLE", "x", 1, NOW_MS * 2)
    desk.see(ModelRecord("m", "onnx"), failure)
    await desk.catalog.unregister("m")
    assert desk.stored(registry.key_of(failure)) is None


async def test_delete_keeps_what_others_name_and_what_was_registered_by_itself(
    desk: Desk,
) -> None:
    desk.see(
        ModelRecord("shared", "onnx", auto_delete=True),
        ModelRecord("direct", "onnx"),
        VModelRecord("a", "shared", "direct"),
        VModelRecord("b", "shared", "shared"),
    )
    assert await desk.catalog.delete("a") == (True, ())
    assert desk.stored("models/shared") is not None
    assert desk.stored("models/direct") is not None
    assert await desk.catalog.delete("b") == (True, ("shared",))
    assert await desk.catalog.delete("direct") == (True, ("direct",))
    assert await desk.catalog.delete("direct") == (False, ())


@pytest.mark.parametrize(
    "there",
    [
        pytest.param((ModelRecord("n", "onnx"),), id="a model of that id"),
        pytest.param((VModelRecord("n", "m", "m", owner="ksp"),), id="another's alias"),
        pytest.param((), id="nothing"),
    ],
)
async def test_an_owner_deletes_nothing_but_its_own_alias(desk: Desk, there: Any) -> None:
    desk.see(*there)
    assert await desk.catalog.delete("n", owner="isvc") == (False, ())
    assert [desk.stored(registry.key_of(record)) for record in there] == list(there)
    assert (await desk.catalog.delete("n", owner="ksp"))[0] is isinstance(
        next(iter(there), None), VModelRecord
    )


@pytest.mark.parametrize("change", ["nothing", "spec", "scaling", "manifest", "owner", "gone"])
async def test_what_is_applied_is_what_apply_leaves_alone(desk: Desk, change: str) -> None:
    wanted = applied("n", "n-1")
    assert not is_applied(wanted, None, None)
    await desk.catalog.apply(wanted)
    match change:
        case "spec":
            wanted = applied("n", "n-2")
        case "scaling":
            wanted = applied("n", "n-1", min_copies=3)
        case "manifest":
            wanted = applied("n", "n-1", manifest='{"a": 1}')
        case "owner":
            wanted = replace(wanted, alias=replace(wanted.alias, owner="ksp"))
        case "gone":
            desk.view.delete_model("n-1")
    alias = desk.view.vmodels["n"]
    model = desk.view.models.get(alias.target_model_id)
    assert is_applied(wanted, alias, model) is (change == "nothing")


async def test_an_orphan_is_deleted_but_not_one_that_was_just_named(desk: Desk) -> None:
    orphan = ModelRecord("m", "onnx", auto_delete=True)
    desk.see(orphan)
    # Applied through another router: the model is written again with its alias.
    desk.write(orphan, VModelRecord("name", "m", "m"))
    assert not await desk.catalog.delete_orphan("m")
    assert desk.stored("models/m") is not None
    await desk.store.delete("vmodels/name")
    desk.view.advance(desk.store.server.revision)
    assert await desk.catalog.delete_orphan("m")


async def test_an_alias_is_replaced_only_where_it_stands_as_it_was_seen(desk: Desk) -> None:
    seen = VModelRecord("name", "old", "new")
    desk.see(seen, ModelRecord("old", "onnx", auto_delete=True))
    moved = VModelRecord("name", "new", "new")
    desk.write(VModelRecord("name", "old", "newer"))
    assert not await desk.catalog.replace_alias(seen, moved, "old")
    assert desk.stored("models/old") is not None
    desk.write(seen)
    assert await desk.catalog.replace_alias(seen, moved, "old")
    assert desk.stored("vmodels/name") == moved
    assert desk.stored("models/old") is None


async def test_only_failures_that_are_over_are_deleted(desk: Desk) -> None:
    over = FailureRecord("m", "a", "UNAVAILABLE", "x", 1, NOW_MS - 1)
    anew = FailureRecord("m", "b", "UNAVAILABLE", "x", 1, NOW_MS - 1)
    desk.see(ModelRecord("m", "onnx"), over, anew)
    desk.write(FailureRecord("m", "b", "UNAVAILABLE", "again", 1, NOW_MS + 9))
    pairs = [("m", "a"), ("m", "b"), ("m", "gone")]
    assert await desk.catalog.delete_failures(pairs, NOW_MS) == 1
    assert desk.stored(registry.key_of(over)) is None
    assert desk.stored(registry.key_of(anew)).message == "again"


async def test_the_last_uses_of_an_instance_that_is_back_are_kept(desk: Desk) -> None:
    for name in ("gone", "back"):
        await desk.store.put(registry.last_used_key(name), registry.encode_last_used({"m": 1}))
        desk.view.put_last_used(name, {"m": 1})
    await desk.store.put(registry.instance_key("back"), b"{}")
    await desk.catalog.delete_last_used(["gone", "back"])
    assert await desk.store.get(registry.last_used_key("gone")) is None
    assert await desk.store.get(registry.last_used_key("back")) is not None
    assert [name for name, _ in desk.view.flushed_by_the_gone()] == ["back"]
