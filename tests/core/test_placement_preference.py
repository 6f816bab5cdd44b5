"""Soft filters of placement, one row a sentence: labels, replica sets, hot and avoided instances,
zones. The rest of the rules are in ``test_placement_rules.py``."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mesh.core.errors import Code
from mesh.core.placement import NoPlacement, Placement, place
from mesh.core.policy import Policy
from mesh.core.types import InstanceRecord, InstanceState, ModelRecord
from tests.core.cluster import (
    DRAINING,
    NOW,
    POLICY,
    READY,
    STARTING,
    Record,
    copy,
    instance,
    model,
    view_of,
)

M = model(size_bytes_stated=20)
GPU = model(size_bytes_stated=20, required_labels=("gpu",))
LIKES_BIG = model(size_bytes_stated=20, preferred_labels=("big",))
CONSTRAINTS = {"onnx": {"required": ["gpu"], "preferred": ["big"]}}
HOT = POLICY.hot_requests_per_minute + 1
WINDOW = POLICY.replacement_window_ms
# What ``place`` is asked beside the model: ``avoid`` and the type constraints that are set.
Asked = dict[str, object]


def full(instance_id: str, *, lru_age_ms: int | None = 60_000, **fields: object) -> InstanceRecord:
    lru_at_ms = 0 if lru_age_ms is None else NOW - lru_age_ms
    return instance(instance_id, **{"used_bytes": 100, "lru_at_ms": lru_at_ms, **fields})


def group(
    instance_id: str,
    replica_set: str,
    age_ms: int,
    state: InstanceState = READY,
    **fields: object,
) -> InstanceRecord:
    told = {"group": "g", "replica_set": replica_set, "started_at_ms": NOW - age_ms, **fields}
    return instance(instance_id, state, **told)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "asked", "records", "chosen", "reason", "runner_up", "marks"),
    [
        # -- required labels
        pytest.param(
            GPU, {}, [instance("a"), instance("b", labels=("x", "gpu"), used_bytes=99)],
            "b", "only_candidate", None, (),
            id="an instance without a label that the model requires is never chosen",
        ),
        pytest.param(
            M, {"constraints": CONSTRAINTS},
            [instance("a"), instance("b", labels=("gpu",), used_bytes=99)],
            "b", "only_candidate", None, ("not_preferred",),
            id="nor one without a label that the format requires",
        ),
        pytest.param(
            M, {"constraints": {"_default": {"required": ["gpu"]}}},
            [instance("a"), instance("b", labels=("gpu",), used_bytes=99)],
            "b", "only_candidate", None, (),
            id="a constraint by default is for formats without one",
        ),
        pytest.param(
            M, {"constraints": {"_default": {"required": ["gpu"]}, "onnx": {}}},
            [instance("a"), instance("b", labels=("gpu",), used_bytes=99)],
            "a", "not_full", "b", (),
            id="and not for those with one",
        ),
        pytest.param(
            M, {"constraints": {"sklearn": {"required": ["gpu"]}}},
            [instance("a"), instance("b", labels=("gpu",), used_bytes=99)],
            "a", "not_full", "b", (),
            id="another format's constraint is no obstacle",
        ),
        pytest.param(
            model(size_bytes_stated=20, required_labels=("ssd",)), {"constraints": CONSTRAINTS},
            [instance("a", labels=("gpu",)), instance("b", labels=("gpu", "ssd"), used_bytes=99)],
            "b", "only_candidate", None, ("not_preferred",),
            id="a model's labels come on top of its format's",
        ),
        # -- avoided
        pytest.param(
            M, {"avoid": "a"}, [instance("a"), full("b")],
            "b", "not_avoided", "a", (),
            id="one that does not answer is passed over though others are full",
        ),
        pytest.param(
            M, {"avoid": "a"}, [instance("a"), instance("b", DRAINING)],
            "a", "only_candidate", None, ("avoided",),
            id="but is better than none",
        ),
        pytest.param(
            M, {"avoid": "ab"}, [instance("a", used_bytes=50), instance("b")],
            "b", "most_free", "a", ("avoided",),
            id="when all are avoided the order decides",
        ),
        # -- about to be replaced
        pytest.param(
            M, {}, [group("a", "old", WINDOW * 2), group("b", "new", 9, used_bytes=99)],
            "b", "not_replaced", "a", (),
            id="an older replica set's instance is passed over while a newer one comes",
        ),
        pytest.param(
            M, {}, [group("a", "old", WINDOW * 2), group("b", "new", WINDOW, used_bytes=99)],
            "a", "not_full", "b", (),
            id="no longer when the newer one came long ago",
        ),
        pytest.param(
            M, {},
            [group("a", "old", WINDOW * 2), instance("c", group="other", replica_set="new",
             started_at_ms=NOW, used_bytes=99)],
            "a", "not_full", "c", (),
            id="another group's new replica set replaces nothing here",
        ),
        pytest.param(
            M, {}, [group("a", "old", WINDOW * 2), group("b", "new", 9, model_types=())],
            "a", "only_candidate", None, ("being_replaced",),
            id="what is about to be replaced is better than none",
        ),
        pytest.param(
            M, {},
            [
                group("a", "old", WINDOW * 2), group("b", "new", 9, STARTING),
                instance("c", used_bytes=99),
            ],
            "c", "not_replaced", "a", (),
            id="a new replica set counts from its first instance that starts",
        ),
        pytest.param(
            M, {},
            [
                group("a", "old", WINDOW * 2), group("b", "new", 9, DRAINING),
                instance("c", used_bytes=99),
            ],
            "a", "not_full", "c", (),
            id="one that was taken back does not",
        ),
        pytest.param(
            M, {"avoid": "b"}, [group("a", "old", WINDOW * 2), group("b", "new", 9)],
            "a", "not_avoided", "b", ("being_replaced",),
            id="what answers and is replaced goes before what does not answer",
        ),
        # -- preferred labels
        pytest.param(
            LIKES_BIG, {}, [instance("a"), instance("b", used_bytes=70, labels=("big",))],
            "b", "preferred_labels", "a", (),
            id="preferred labels go before more memory",
        ),
        pytest.param(
            M, {"constraints": {"onnx": {"preferred": ["big"]}}},
            [instance("a"), instance("b", used_bytes=70, labels=("big",))],
            "b", "preferred_labels", "a", (),
            id="so do those that the format prefers",
        ),
        pytest.param(
            LIKES_BIG, {}, [instance("a"), full("b", labels=("big",))],
            "a", "not_full", "b", ("not_preferred",),
            id="but nothing is evicted for them while there is room",
        ),
        pytest.param(
            LIKES_BIG, {}, [full("a", lru_age_ms=61_000), full("b", labels=("big",))],
            "b", "preferred_labels", "a", (),
            id="all full: they decide where about as little is lost",
        ),
        pytest.param(
            LIKES_BIG, {}, [full("a", lru_age_ms=90_000), full("b", labels=("big",))],
            "a", "oldest_lru", "b", ("not_preferred",),
            id="all full: and not where more is lost",
        ),
        pytest.param(
            model(size_bytes_stated=20, preferred_labels=("big", "ssd")), {},
            [instance("a", labels=("big",)), instance("b", used_bytes=70, labels=("ssd", "big"))],
            "b", "preferred_labels", "a", (),
            id="all of the preferred labels count, or none",
        ),
        pytest.param(
            LIKES_BIG, {},
            [group("a", "old", WINDOW * 2, labels=("big",)), group("b", "new", 9)],
            "b", "not_replaced", "a", ("not_preferred",),
            id="being replaced weighs more than preferred labels",
        ),
        # -- hot
        pytest.param(
            M, {},
            [instance("a", requests_per_minute=HOT), instance("b", used_bytes=70)],
            "b", "not_hot", "a", (),
            id="a hot instance is passed over",
        ),
        pytest.param(
            M, {},
            [instance("a", requests_per_minute=HOT - 1), instance("b", used_bytes=70)],
            "a", "most_free", "b", (),
            id="one below the threshold is not hot",
        ),
        pytest.param(
            M, {},
            [
                instance("a", requests_per_minute=HOT),
                instance("b", used_bytes=70, requests_per_minute=HOT * 2 // 3 + 1),
            ],
            "a", "most_free", "b", (),
            id="nor one that answers about as many as the coolest",
        ),
        pytest.param(
            M, {},
            [
                instance("a", requests_per_minute=HOT),
                instance("b", model_types=()),
            ],
            "a", "only_candidate", None, (),
            id="nor the only one, however much it answers",
        ),
        pytest.param(
            M, {}, [instance("a", requests_per_minute=HOT), full("b")],
            "a", "not_full", "b", ("hot",),
            id="nothing is evicted elsewhere because an instance with room is hot",
        ),
        # -- zones
        pytest.param(
            M, {},
            [
                instance("a", zone="z1"), copy("m", "a"),
                instance("b", zone="z1"), instance("c", zone="z2", used_bytes=70),
            ],
            "c", "zone_spread", "b", (),
            id="a second copy goes to a zone without one",
        ),
        pytest.param(
            M, {},
            [
                instance("a", zone="z1"), copy("m", "a"), instance("b", zone="z1"),
                full("c", zone="z2"),
            ],
            "b", "not_full", "c", (),
            id="but nothing is evicted for it while there is room",
        ),
        pytest.param(
            M, {},
            [instance("a", zone="z1"), instance("b", zone="z2", used_bytes=70), copy("n", "a")],
            "a", "most_free", "b", (),
            id="zones do not matter to a first copy",
        ),
        pytest.param(
            M, {},
            [
                instance("a", DRAINING, zone="z1"), copy("m", "a"),
                instance("b", zone="z1"), instance("c", zone="z2", used_bytes=70),
            ],
            "b", "most_free", "c", (),
            id="nor does a copy that is about to leave",
        ),
        pytest.param(
            M, {},
            [
                instance("a1", zone="a"), copy("m", "a1"), instance("a2", zone="a"),
                copy("m", "a2"), instance("a3", zone="a"),
                instance("b1", zone="b"), copy("m", "b1"), instance("b2", zone="b", used_bytes=70),
            ],
            "b2", "zone_spread", "a3", (),
            id="every zone has one: the zone with the fewest",
        ),
        # -- closeness
        pytest.param(
            M, {}, [instance("a", used_bytes=70), instance("b"), instance("c", used_bytes=60)],
            "b", "most_free", "c", (),
            id="what came second is the best of the rest",
        ),
    ],
)  # fmt: skip
def test_what_is_preferred(
    one: ModelRecord,
    asked: Asked,
    records: list[Record],
    chosen: str,
    reason: str,
    runner_up: str | None,
    marks: tuple[str, ...],
) -> None:
    view = view_of(one, *records)
    constraints = asked.get("constraints")
    if isinstance(constraints, Mapping):
        view.put_config("type_constraints", constraints)
    avoid = set(str(asked.get("avoid", "")))
    found = place(view, one, now_ms=NOW, policy=POLICY, avoid=avoid)
    assert isinstance(found, Placement), found
    assert (found.instance_id, found.reason, found.runner_up) == (chosen, reason, runner_up)
    assert found.marks == marks
    assert all(mark in found.detail for mark in marks)


def test_required_labels_that_nobody_has_are_named_and_final() -> None:
    view = view_of(
        GPU, instance("a", labels=("ssd",)), instance("b"), instance("c", model_types=())
    )
    found = place(view, GPU, now_ms=NOW, policy=POLICY)
    assert isinstance(found, NoPlacement)
    assert (found.reason, found.code) == ("no_label", Code.FAILED_PRECONDITION)
    assert not found.retryable
    assert found.detail == (
        "model 'm' cannot be loaded: no instance that runs 'onnx' has all the labels that are "
        "required: gpu; labels of those that run: ssd"
    )


def test_a_label_that_only_small_instances_have_names_their_size() -> None:
    view = view_of(GPU, instance("a"), instance("b", capacity=7, labels=("gpu",)))
    found = place(view, GPU, now_ms=NOW, policy=POLICY)
    assert isinstance(found, NoPlacement) and found.reason == "too_large"
    assert "the largest that runs 'onnx' with gpu has 7 bytes" in found.detail


def test_a_labelled_instance_that_starts_may_be_what_is_missing() -> None:
    view = view_of(GPU, instance("a"), instance("b", STARTING))
    found = place(view, GPU, now_ms=NOW, policy=POLICY)
    assert isinstance(found, NoPlacement) and found.reason == "instances_starting"


def test_where_all_are_avoided_there_is_still_a_place() -> None:
    view = view_of(M, instance("a"), instance("b"))
    found = place(view, M, now_ms=NOW, policy=POLICY, avoid={"a", "b"})
    assert isinstance(found, Placement) and found.marks == ("avoided",)


def test_a_copy_asked_for_counts_in_its_zone() -> None:
    view = view_of(M, *(instance(i, zone=z) for i, z in (("a", "z1"), ("b", "z1"), ("c", "z2"))))
    view.add_pending("m", "a", size_bytes=20, now_ms=NOW)
    found = place(view, M, now_ms=NOW, policy=POLICY)
    assert isinstance(found, Placement)
    assert (found.instance_id, found.reason) == ("c", "zone_spread")


def test_the_thresholds_are_the_policys() -> None:
    hot = view_of(M, instance("a", requests_per_minute=50), instance("b", used_bytes=70))
    found = place(hot, M, now_ms=NOW, policy=Policy(hot_requests_per_minute=49))
    assert isinstance(found, Placement) and found.reason == "not_hot"
    new = view_of(M, group("a", "old", 100), group("b", "new", 50))
    for window_ms, reason in ((51, "not_replaced"), (50, "tie_hash")):
        found = place(new, M, now_ms=NOW, policy=Policy(replacement_window_ms=window_ms))
        assert isinstance(found, Placement) and found.reason == reason
    several = [instance("a", used_bytes=40), instance("b"), instance("c", used_bytes=45)]
    for share, spread in ((0.5, True), (0.9, False)):
        policy = Policy(close_free_share=share, default_model_size_bytes=10)
        names = [f"m{n}" for n in range(40)]
        found = [place(view_of(*several), model(name), now_ms=NOW, policy=policy) for name in names]
        assert (len({p.instance_id for p in found if isinstance(p, Placement)}) > 1) is spread
