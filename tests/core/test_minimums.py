"""Pins and minimums of copies: a sentence a rule."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mesh.core.minimums import (
    LoadOrder,
    Shortfall,
    grant_minimums,
    missing_copies,
    missing_in_slices,
    shortfall_of,
)
from mesh.core.repair import RepairPlan, plan_repair
from tests.core.cluster import (
    DRAINING,
    LOADING,
    NOW,
    POLICY,
    Record,
    copy,
    failure,
    instance,
    model,
    view_of,
)


def swept(*records: Record) -> RepairPlan:
    return plan_repair(view_of(*records), now_ms=NOW, policy=POLICY)


def orders(plan: RepairPlan) -> list[tuple[str, str, str, str]]:
    return [(o.model_id, o.placement.instance_id, o.reason, o.priority.value) for o in plan.loads]


def test_two_or_more_minimum_copies_are_loaded_where_there_is_room() -> None:
    plan = swept(model(min_copies=2), instance("a"), instance("b"), copy("m", "a"))
    assert orders(plan) == [("m", "b", "min_copies", "COPY")]


def test_a_minimum_evicts_only_what_was_used_less_recently_than_the_model() -> None:
    full = instance("b", used_bytes=95, lru_at_ms=NOW - 100)
    records = (instance("a"), full, copy("m", "a"))
    assert orders(swept(model(min_copies=2, last_used_at_ms=NOW - 99), *records)) == [
        ("m", "b", "min_copies", "COPY")
    ]
    (short,) = swept(model(min_copies=2, last_used_at_ms=NOW - 100), *records).shortfalls
    assert (short.model_id, short.missing, short.reason) == ("m", 1, "no_room")
    assert "b was used more recently" in short.detail


def test_who_registers_a_minimum_wants_it_as_of_then() -> None:
    full = instance("b", used_bytes=95, lru_at_ms=NOW - 100)
    plan = swept(model(min_copies=2, created_at_ms=NOW), instance("a"), full, copy("m", "a"))
    assert [order.model_id for order in plan.loads] == ["m"]


def test_memory_that_loads_under_way_take_is_nothing_to_evict() -> None:
    plan = swept(
        model(min_copies=2, created_at_ms=NOW),
        instance("a"),
        instance("b", used_bytes=95, lru_at_ms=0),
        copy("m", "a"),
    )
    assert [short.reason for short in plan.shortfalls] == ["no_room"]


def test_one_minimum_copy_is_no_wish() -> None:
    assert swept(model(min_copies=1), instance("a")).loads == ()


def test_a_pinned_model_is_loaded_even_where_something_has_to_go() -> None:
    plan = swept(model(pinned=True), instance("a", used_bytes=100))
    assert orders(plan) == [("m", "a", "pinned", "AWAITED")]


def test_a_pinned_model_with_a_pinned_copy_needs_none() -> None:
    assert swept(model(pinned=True), instance("a"), copy("m", "a", pinned=True)).loads == ()


def test_a_pinned_copy_on_a_draining_instance_is_replaced_in_time() -> None:
    plan = swept(model(pinned=True), instance("a", DRAINING), instance("b"), copy("m", "a"))
    assert orders(plan) == [("m", "b", "pinned", "AWAITED")]


def test_further_copies_of_a_pinned_model_are_as_soft_as_any() -> None:
    records = (model(pinned=True, min_copies=2), instance("a"), copy("m", "a", pinned=True))
    assert orders(swept(*records, instance("b"))) == [("m", "b", "min_copies", "COPY")]
    (short,) = swept(*records, instance("b", used_bytes=99, lru_at_ms=NOW)).shortfalls
    assert (short.missing, short.reason) == (1, "no_room")


def test_a_pinned_model_that_has_copies_has_the_oldest_loaded_one_pinned_in_place() -> None:
    plan = swept(
        model(pinned=True),
        *(instance(i, used_bytes=100) for i in "abc"),
        copy("m", "a", LOADING, claimed_at_ms=1),
        copy("m", "b", claimed_at_ms=3),
        copy("m", "c", claimed_at_ms=2),
    )
    (order,) = plan.loads
    assert (order.placement.instance_id, order.pin, order.reason) == ("c", True, "pinned")
    assert order.placement.reason == "has_copy"


def test_a_pinned_model_with_only_a_load_under_way_joins_it() -> None:
    (order,) = swept(model(pinned=True), instance("a"), copy("m", "a", LOADING)).loads
    assert (order.placement.instance_id, order.pin) == ("a", True)


def test_an_instance_that_was_asked_to_pin_lately_is_not_asked_again_nor_is_another() -> None:
    view = view_of(model(pinned=True), instance("a"), instance("b"), copy("m", "a"))
    plan = plan_repair(view, now_ms=NOW, policy=POLICY, tried={"m": ["a"]})
    assert (plan.loads, plan.shortfalls) == ((), ())


def test_only_a_load_that_pins_says_so() -> None:
    plan = swept(
        model("p", pinned=True, model_type="sklearn"),
        model("m", min_copies=2),
        instance("a"),
        instance("b"),
        instance("c", model_types=("sklearn",)),
        copy("m", "a"),
    )
    assert {order.model_id: order.pin for order in plan.loads} == {"p": True, "m": False}


def test_a_model_whose_instance_gets_another_load_first_is_asked_about_again() -> None:
    plan = swept(*(model(f"p{n}", pinned=True) for n in range(3)), instance("a"))
    assert [order.model_id for order in plan.loads] == ["p0"]
    assert plan.crowded == ("p1", "p2")


def test_of_two_pinned_copies_the_one_that_came_last_goes() -> None:
    plan = swept(
        model(pinned=True),
        instance("a"),
        instance("b"),
        copy("m", "a", pinned=True, claimed_at_ms=9),
        copy("m", "b", pinned=True, claimed_at_ms=8),
    )
    assert plan.surplus_pins == (("m", "a"),)
    assert plan.loads == ()


def test_a_pinned_copy_of_a_draining_instance_is_no_second_one() -> None:
    plan = swept(
        model(pinned=True),
        instance("a", DRAINING),
        instance("b"),
        copy("m", "a", pinned=True, claimed_at_ms=8),
        copy("m", "b", pinned=True, claimed_at_ms=9),
    )
    assert plan.surplus_pins == ()


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 60), st.integers(0, 9)), min_size=1, max_size=12
    ),
    st.integers(0, 300),
    st.floats(0, 1),
)
def test_minimums_never_keep_more_than_their_share(
    wishes: list[tuple[int, int, int]], capacity: int, share: float
) -> None:
    models = [
        model(f"m{n:02}", min_copies=wish, size_bytes_measured=size, last_used_at_ms=NOW - age)
        for n, (wish, size, age) in enumerate(wishes)
    ]
    view = view_of(*models, instance("a", capacity=capacity))
    policy = replace(POLICY, min_copies_capacity_share=share)
    minimums = grant_minimums(view, policy)
    granted = {m.model_id: minimums.granted(m) for m in models if m.min_copies > 1}
    if not capacity:
        assert not minimums.cut  # it is not the share that is short
        return
    sizes = {m.model_id: m.size_bytes_measured or 0 for m in models}
    kept = sum(count * sizes[model_id] for model_id, count in granted.items())
    assert kept <= minimums.share_bytes
    # Nobody is cut while there is room for one copy more of it.
    left = minimums.share_bytes - kept
    assert all(sizes[model_id] > left for model_id in minimums.cut)


# ---- the share of memory that minimums may keep --------------------------------------------------


def test_minimums_are_honoured_by_last_use_up_to_a_share_of_the_ready_capacity() -> None:
    view = view_of(
        *(model(f"m{n}", min_copies=2, last_used_at_ms=NOW - n) for n in range(8)),
        instance("a"),
        instance("b"),
        instance("leaving", DRAINING),
    )  # 100 of 200 bytes may be kept: five times two copies of ten bytes
    minimums = grant_minimums(view, POLICY)
    assert (minimums.share_bytes, minimums.wished_bytes) == (100, 160)
    assert minimums.cut == {"m5": 0, "m6": 0, "m7": 0}


def test_a_minimum_that_does_not_fit_whole_gets_the_copies_that_do() -> None:
    view = view_of(
        model("new", min_copies=4, last_used_at_ms=NOW),
        model("old", min_copies=3, last_used_at_ms=NOW - 1),
        model("oldest", min_copies=2, size_bytes_measured=1, last_used_at_ms=NOW - 2),
        instance("a", capacity=101),
    )
    assert grant_minimums(view, POLICY).cut == {"old": 1, "oldest": 0}


def test_what_is_over_the_share_is_not_loaded_and_says_so() -> None:
    view = view_of(
        model("new", min_copies=2, last_used_at_ms=NOW),
        model("old", min_copies=2, last_used_at_ms=NOW - 1),
        instance("a", capacity=30),
        instance("b", capacity=30),
    )
    plan = plan_repair(view, now_ms=NOW, policy=POLICY)
    # old may have one of its two
    assert {order.model_id for order in plan.loads} | set(plan.crowded) == {"new", "old"}
    (short,) = plan.shortfalls
    assert (short.model_id, short.missing, short.reason) == ("old", 1, "over_share")
    assert "40 bytes" in short.detail and "30 bytes may be kept" in short.detail
    assert plan.lacking == {"over_share": 1}


def test_without_any_instance_the_share_is_not_the_reason() -> None:
    (short,) = swept(model(min_copies=2)).shortfalls
    assert (short.missing, short.reason) == (2, "no_instances")


def test_pins_are_not_counted_against_the_share() -> None:
    plan = swept(*(model(f"p{n}", pinned=True) for n in range(3)), instance("a", capacity=10))
    assert len(plan.loads) == 1  # one an instance and look
    assert plan.lacking == {}


def test_any_router_can_tell_why_one_model_has_too_few_copies() -> None:
    view = view_of(
        model("fine", min_copies=2),
        model("coming", min_copies=2),
        model("stuck", min_copies=2, model_type="sklearn"),
        model("plain"),
        instance("a", capacity=1_000),
        instance("b", capacity=1_000),
        copy("fine", "a"),
        copy("fine", "b"),
    )

    def why(model_id: str) -> Shortfall | None:
        return shortfall_of(view, view.models[model_id], NOW, POLICY)

    assert [why(m) for m in ("fine", "coming", "plain")] == [None, None, None]
    stuck = why("stuck")
    assert stuck is not None
    assert (stuck.missing, stuck.reason) == (2, "no_runtime")


def test_any_router_can_tell_that_a_model_is_over_the_share() -> None:
    view = view_of(
        *(model(f"m{n}", min_copies=2, last_used_at_ms=NOW - n) for n in range(4)),
        instance("a"),
        instance("b", capacity=10),
        *(copy(f"m{n}", "a") for n in range(4)),
    )
    found = {n: shortfall_of(view, view.models[f"m{n}"], NOW, POLICY) for n in range(4)}
    assert found[1] is None  # it may have its second copy, and there is room for one
    assert found[3] is not None
    assert (found[3].missing, found[3].reason) == (1, "over_share")


def test_who_refused_lately_is_passed_over_and_named_when_nobody_is_left() -> None:
    view = view_of(model(min_copies=2), instance("a"), instance("b"), instance("c"), copy("m", "a"))
    plan = plan_repair(view, now_ms=NOW, policy=POLICY, tried={"m": ["b"]})
    assert [order.placement.instance_id for order in plan.loads] == ["c"]
    plan = plan_repair(view, now_ms=NOW, policy=POLICY, tried={"m": ["b", "c"]})
    (short,) = plan.shortfalls
    assert (short.reason, short.missing) == ("refused", 1)
    assert "b, c did not take it" in short.detail


def test_one_copy_after_another_as_a_claim_must_not_lose_against_the_last_one() -> None:
    view = view_of(model(min_copies=3), *(instance(i) for i in "abc"))
    view.add_pending("m", "a", size_bytes=10, now_ms=NOW)
    assert plan_repair(view, now_ms=NOW, policy=POLICY).loads == ()
    view.put_copy(copy("m", "a", LOADING))
    (order,) = plan_repair(view, now_ms=NOW, policy=POLICY).loads
    assert order.placement.instance_id in "bc"


def test_when_many_are_short_each_sweep_begins_further_on() -> None:
    policy = replace(POLICY, repair_batch_max=4, repair_loads_max=100)
    stuck = [model(f"s{n}", min_copies=2, model_type="sklearn") for n in range(9)]
    view = view_of(*stuck, instance("a", capacity=10_000))
    looked_at: set[str] = set()
    for sweep in range(5):
        now_ms = NOW + sweep * policy.leader_sweep_ms
        plan = plan_repair(view, now_ms=now_ms, policy=policy)
        assert sum(plan.lacking.values()) == 18
        assert plan.lacking["in_turn"] >= 10
        assert len(plan.shortfalls) <= 4
        looked_at |= {short.model_id for short in plan.shortfalls}
    assert len(looked_at) == 9


def test_a_wish_that_cannot_be_had_says_why() -> None:
    plan = swept(model(pinned=True), instance("a"), failure("m", "a", message="bad magic"))
    (short,) = plan.shortfalls
    assert (short.reason, short.missing) == ("load_failed", 1)
    assert "bad magic" in short.detail


def test_what_was_asked_for_counts() -> None:
    view = view_of(model(pinned=True), instance("a"))
    view.add_pending("m", "a", size_bytes=10, now_ms=NOW)
    assert plan_repair(view, now_ms=NOW, policy=POLICY).loads == ()


def test_asking_again_after_each_round_fills_all_and_never_over_capacity() -> None:
    view = view_of(
        *(model(f"m{n}", min_copies=2) for n in range(6)),
        *(instance(i, capacity=50) for i in "abc"),
    )
    rounds: list[tuple[LoadOrder, ...]] = []
    policy = replace(POLICY, min_copies_capacity_share=1.0)
    while loads := missing_copies(view, now_ms=NOW, policy=policy)[0]:
        assert len({o.placement.instance_id for o in loads}) == len(loads)
        for order in loads:
            view.put_copy(copy(order.model_id, order.placement.instance_id, LOADING))
        rounds.append(loads)
        assert len(rounds) <= 16
    assert sum(map(len, rounds)) == 12
    assert all(slot.effective_used_bytes <= 50 for slot in view.instances.values())
    assert sorted(slot.effective_used_bytes for slot in view.instances.values()) == [40, 40, 40]


def test_a_look_at_some_models_passes_over_the_others() -> None:
    view = view_of(
        model("a", pinned=True), model("b", pinned=True), model("c"), instance("i"), instance("j")
    )
    loads, _ = missing_copies(view, now_ms=NOW, policy=POLICY, among={"b", "c", "gone"})
    assert [order.model_id for order in loads] == ["b"]


def test_what_is_found_in_slices_is_decided_from_the_view_as_it_is_at_the_end() -> None:
    view = view_of(
        *(model(f"m{n:04}", min_copies=2) for n in range(3_000)),
        instance("a", capacity=10**6),
        instance("b", capacity=10**6),
        *(copy(f"m{n:04}", i) for n in range(3_000) for i in "ab" if n or i == "a"),
    )
    slices = missing_in_slices(view, now_ms=NOW, policy=POLICY)
    yields = 0
    while True:
        try:
            next(slices)
        except StopIteration as ended:
            found = ended.value
            break
        yields += 1
        if yields == 4:  # all were counted already, but the last thousand
            view.put_copy(copy("m0000", "b", LOADING))
            view.delete_model("m2999")
    assert yields >= 4
    assert found.loads == ()
