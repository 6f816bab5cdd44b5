"""The view: what is routable, what is free, what a name means."""

from __future__ import annotations

from mesh.core.view import FAMILIES, ClusterView, Resolved, Unresolved
from tests.core.cluster import (
    DRAINING,
    LOADED,
    LOADING,
    NOW,
    READY,
    STARTING,
    copy,
    failure,
    instance,
    model,
    view_of,
    vmodel,
)


def test_a_deleted_instance_takes_its_copies_out_of_routing_at_once() -> None:
    view = view_of(model(), instance("a"), instance("b"), copy("m", "a"), copy("m", "b"))
    view.delete_instance("a")
    assert view.loaded_on("m") == ("b",)
    assert [c.instance_id for c in view.copies_of("m")] == ["b"]
    assert view.copy("m", "a") is None


def test_a_copy_seen_before_its_instance_becomes_routable_with_it() -> None:
    view = view_of(model(), copy("m", "a", size=30))
    assert view.loaded_on("m") == ()
    view.put_instance(instance("a"))
    assert view.loaded_on("m") == ("a",)
    assert view.instances["a"].effective_free_bytes == 70


def test_an_instance_that_comes_back_brings_copies_that_were_not_deleted() -> None:
    view = view_of(model(), instance("a"), copy("m", "a"), copy("n", "a"))
    view.delete_instance("a")
    view.delete_copy("n", "a")
    view.put_instance(instance("a"))
    assert view.loaded_on("m") == ("a",)
    assert view.loaded_on("n") == ()


def test_a_draining_instance_is_routable_only_while_no_ready_one_has_a_copy() -> None:
    view = view_of(model(), instance("a"), copy("m", "a"), instance("b"))
    view.put_instance(instance("a", DRAINING))
    assert view.loaded_on("m") == ("a",) and view.lasting_on("m") == ()
    view.put_copy(copy("m", "b", LOADING))
    assert view.loaded_on("m") == ("a",)  # what loads does not answer yet
    view.put_copy(copy("m", "b"))
    assert view.loaded_on("m") == view.lasting_on("m") == ("b",)
    view.put_instance(instance("a", READY))
    assert view.loaded_on("m") == ("a", "b")


def test_a_starting_instance_is_not_routable() -> None:
    view = view_of(model(), instance("a", STARTING), copy("m", "a"))
    assert view.loaded_on("m") == ()


def test_a_loading_copy_is_not_routable() -> None:
    view = view_of(model(), instance("a"), copy("m", "a", LOADING))
    assert view.loaded_on("m") == ()
    view.put_copy(copy("m", "a", LOADED))
    assert view.loaded_on("m") == ("a",)


def test_free_bytes_count_the_larger_of_advert_and_copies_and_what_is_pending() -> None:
    view = view_of(instance("a", used_bytes=25), copy("m", "a", size=20))
    slot = view.instances["a"]
    assert slot.effective_free_bytes == 75  # the advert knows of more than the copies do
    view.put_copy(copy("n", "a", size=20))
    assert slot.effective_free_bytes == 60  # the copies know of more than the advert does
    view.add_pending("o", "a", size_bytes=35, now_ms=NOW)
    assert slot.effective_free_bytes == 25
    view.add_pending("p", "a", size_bytes=99, now_ms=NOW)
    assert slot.effective_free_bytes == 0  # never negative


def test_a_pending_load_ends_when_its_copy_is_seen() -> None:
    view = view_of(instance("a"))
    view.add_pending("m", "a", size_bytes=10, now_ms=NOW)
    assert view.pending_of("m") == ("a",)
    view.put_copy(copy("m", "a", LOADING, size=10))
    assert view.pending_of("m") == ()
    assert view.instances["a"].effective_free_bytes == 90
    assert view.instances["a"].loads_in_progress == 1


def test_a_pending_load_ends_when_dropped_expired_or_its_instance_goes() -> None:
    view = view_of(instance("a"), instance("b"), instance("c"))
    for instance_id in "abc":
        view.add_pending("m", instance_id, size_bytes=10, now_ms=NOW)
    view.drop_pending("m", "a")
    view.delete_instance("b")
    assert view.pending_of("m") == ("c",)
    assert view.expire_pending(asked_before_ms=NOW) == 0
    assert view.expire_pending(asked_before_ms=NOW + 1) == 1
    assert view.pending_of("m") == ()
    assert view.instances["c"].pending_bytes == 0


def test_asking_twice_counts_once() -> None:
    view = view_of(instance("a"))
    view.add_pending("m", "a", size_bytes=10, now_ms=NOW)
    view.add_pending("m", "a", size_bytes=30, now_ms=NOW)
    assert view.instances["a"].effective_free_bytes == 70
    assert view.pending_of("m") == ("a",)


def test_a_load_that_answered_is_routable_before_the_store_says_so() -> None:
    view = view_of(model(), instance("a"))
    view.mark_loaded("m", "a", size_bytes=12, copy_revision=7, now_ms=NOW)
    assert view.loaded_on("m") == ("a",)
    view.put_copy(copy("m", "a", LOADING), mod_revision=7)  # its own claim, late
    assert view.loaded_on("m") == ("a",)
    view.put_copy(copy("m", "a", LOADED), mod_revision=8)
    assert view.loaded_on("m") == ("a",)
    view.delete_copy("m", "a", mod_revision=9)
    assert view.loaded_on("m") == ()


def test_an_older_deletion_does_not_take_a_newer_load_away() -> None:
    view = view_of(model(), instance("a"))
    view.mark_loaded("m", "a", size_bytes=12, copy_revision=7, now_ms=NOW)
    view.delete_copy("m", "a", mod_revision=5)
    assert view.loaded_on("m") == ("a",)
    view.delete_copy("m", "a")  # it answered not-here
    assert view.loaded_on("m") == ()


def test_a_later_claim_takes_a_marked_copy_back_to_loading() -> None:
    view = view_of(model(), instance("a"))
    view.mark_loaded("m", "a", size_bytes=12, copy_revision=7, now_ms=NOW)
    view.put_copy(copy("m", "a", LOADING), mod_revision=9)
    assert view.loaded_on("m") == ()


def test_a_snapshot_from_before_a_load_keeps_what_the_load_told() -> None:
    view = view_of(model(), instance("a"))
    view.mark_loaded("m", "a", size_bytes=12, copy_revision=7, now_ms=NOW)
    view.replace_copies([], revision=6)
    assert view.loaded_on("m") == ("a",)
    view.replace_copies([], revision=8)
    assert view.loaded_on("m") == ()
    assert view.revision == 8


def test_a_name_is_an_alias_first_and_a_model_then() -> None:
    view = view_of(model("x"), model("y"), vmodel("x", "y"))
    found = view.resolve("x")
    assert isinstance(found, Resolved) and (found.model_id, found.via) == ("y", "vmodel")
    view.delete_vmodel("x")
    found = view.resolve("x")
    assert isinstance(found, Resolved) and (found.model_id, found.via) == ("x", "model")


def test_an_unknown_name_is_named_and_so_is_what_a_dangling_alias_means() -> None:
    view = view_of(vmodel("alias", "gone"))
    nothing = view.resolve("nope")
    dangling = view.resolve("alias")
    assert isinstance(nothing, Unresolved) and isinstance(dangling, Unresolved)
    assert nothing.reason == "unknown_name" and "'nope'" in nothing.detail
    assert dangling.reason == "dangling_alias" and "'gone'" in dangling.detail


def test_the_routes_epoch_moves_with_whatever_changes_a_route_and_not_with_adverts() -> None:
    view = view_of(model(), instance("a"), copy("m", "a"), vmodel("v", "m"))
    epoch = view.routes_epoch
    view.put_instance(instance("a", used_bytes=5))
    view.put_model(model(size_bytes_measured=4))
    view.put_copy(copy("m", "a", size=11))
    view.put_vmodel(vmodel("v", "m", "m2"))
    moved_by = []
    epoch_before_moves = view.routes_epoch
    for change in (
        lambda: view.put_vmodel(vmodel("v", "m2", "m2")),
        lambda: view.put_instance(instance("b")) or view.put_copy(copy("m", "b")),
        lambda: view.put_instance(instance("a", DRAINING)),
        lambda: view.put_instance(instance("a")),
        lambda: view.delete_copy("m", "a"),
        lambda: view.delete_vmodel("v"),
        lambda: view.delete_model("m"),
    ):
        before = view.routes_epoch
        change()
        moved_by.append(view.routes_epoch > before)
    assert all(moved_by)
    assert epoch_before_moves - epoch <= 1  # a new alias target may move it, adverts never


def test_a_snapshot_replaces_its_family_and_nothing_else() -> None:
    view = view_of(model("a"), model("b"), vmodel("v", "a"), instance("i"), failure("a", "i"))
    view.replace_models([model("b"), model("c")])
    assert sorted(view.models) == ["b", "c"]
    assert list(view.vmodels) == ["v"]
    view.replace_failures([])
    assert view.failures_of("a", NOW) == ()
    view.replace_vmodels([vmodel("w", "c")])
    assert list(view.vmodels) == ["w"]
    assert view.aliases_of("a") == ()
    assert view.aliases_of("c") == ("w",)


def test_it_has_synced_when_every_family_has_had_a_snapshot() -> None:
    view = ClusterView()
    for family in sorted(FAMILIES):
        assert not view.synced
        getattr(view, f"replace_{family}")([])
    assert view.synced


def test_failures_are_the_latest_first_and_expired_ones_are_left_out() -> None:
    view = view_of(
        failure("m", "a", failed_at_ms=NOW - 5),
        failure("m", "b", failed_at_ms=NOW - 1),
        failure("m", "c", expires_at_ms=NOW),
    )
    assert [f.instance_id for f in view.failures_of("m", NOW)] == ["b", "a"]
    assert len(list(view.all_failures())) == 3
    view.delete_failure("m", "b")
    view.delete_failure("m", "never")
    assert [f.instance_id for f in view.failures_of("m", NOW)] == ["a"]


def test_an_auto_delete_model_is_unaliased_until_an_alias_names_it() -> None:
    view = view_of(model("a", auto_delete=True), model("b", auto_delete=True), model("c"))
    assert sorted(view.unaliased_models()) == ["a", "b"]
    view.put_vmodel(vmodel("v", "a", "b"))
    assert sorted(view.unaliased_models()) == []
    view.put_vmodel(vmodel("v", "b", "b"))
    assert sorted(view.unaliased_models()) == ["a"]
    view.delete_vmodel("v")
    assert sorted(view.unaliased_models()) == ["a", "b"]
    view.delete_model("a")
    assert sorted(view.unaliased_models()) == ["b"]


def test_last_use_is_the_latest_that_any_blob_or_record_told() -> None:
    view = view_of(model("a", last_used_at_ms=50), model("b"))
    view.put_last_used("i", {"a": 40, "b": 30, "gone": 99})
    view.put_last_used("j", {"b": 20})
    assert (view.last_used_at_ms("a"), view.last_used_at_ms("b")) == (50, 30)
    assert view.last_used_at_ms("gone") == 0


def test_last_uses_are_the_latest_told_and_models_never_used_are_absent() -> None:
    view = view_of(model("a", last_used_at_ms=5), model("b"), model("c"))
    view.put_last_used("i", {"a": 3, "b": 7, "gone": 9})
    view.put_last_used("j", {"b": 6})
    assert dict(view.last_used) == {"a": 5, "b": 7}
    assert (view.last_used_at_ms("b"), view.last_used_at_ms("c")) == (7, 0)
    view.put_model(model("c", last_used_at_ms=8))
    view.delete_model("a")
    assert dict(view.last_used) == {"b": 7, "c": 8}


def test_a_use_score_is_the_largest_told() -> None:
    view = view_of(model("a"), model("b"))
    view.put_use_scores({"a": 3.5, "b": 1.0, "gone": 9.0})
    view.put_use_scores({"a": 2.5})
    assert (view.use_score("a"), view.use_score("b"), view.use_score("gone")) == (3.5, 1.0, 0.0)
    view.delete_model("a")
    view.put_model(model("a"))
    assert view.use_score("a") == 0.0


def test_what_the_mesh_holds_is_what_ready_instances_hold() -> None:
    view = view_of(
        instance("a", used_bytes=30),
        instance("b", capacity=50),
        instance("c", DRAINING),
        instance("d", STARTING),
    )
    view.add_pending("m", "b", size_bytes=20, now_ms=NOW)
    assert (view.capacity_bytes, view.free_bytes) == (150, 100)
