"""How many copies one model has: a sentence a rule."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from mesh.core.policy import Policy
from mesh.core.scaling import (
    CopyUse,
    Keep,
    ScaleDown,
    ScaleUp,
    Scaling,
    decider,
    in_regular_use,
    memory_of,
    note_use,
    scale,
    worth_reading,
)
from mesh.core.types import ModelRecord
from mesh.core.view import ClusterView
from tests.core.cluster import DRAINING, LOADING, Record, copy, failure, instance, model, view_of

NOW = 1_000_000_000
POLICY = Policy(default_model_size_bytes=10)
RATE = POLICY.scale_up_requests_per_minute
MINUTE = 60_000
HOUR = 60 * MINUTE
LONG_AGO = NOW - 24 * HOUR

RESTING = CopyUse(last_used_at_ms=NOW - 5 * MINUTE, max_concurrency=10)
BUSY = CopyUse(requests_per_minute=RATE + 1, last_used_at_ms=NOW, max_concurrency=10)
REGULAR = CopyUse(
    requests_per_minute=6,
    last_used_at_ms=NOW,
    noted_uses=(NOW - 10 * MINUTE, NOW),
    max_concurrency=10,
)
COUNTS = "abcdefghijkl"


def view_with(copies: int, *others: Record, instances: int = 12, **fields: object) -> ClusterView:
    """``copies`` of model m, on a (the oldest), b, c ... of ``instances`` with free memory."""
    records = [
        copy("m", COUNTS[n], claimed_at_ms=LONG_AGO + n, loaded_at_ms=LONG_AGO + n)
        for n in range(copies)
    ]
    there = [instance(i, **fields) for i in COUNTS[:instances]]  # type: ignore[arg-type]
    return view_of(model(), *there, *records, *others)


def decided(
    view: ClusterView,
    use: CopyUse,
    *,
    by: str = "a",
    record: ModelRecord | None = None,
    policy: Policy = POLICY,
) -> Scaling:
    return scale(view, record or model(), by, use, now_ms=NOW, policy=policy)


# ---- who decides --------------------------------------------------------------------------------


def test_the_instance_that_has_held_it_longest_decides() -> None:
    view = view_with(3)
    assert decider(view, "m") == "a"
    assert isinstance(decided(view, BUSY, by="a"), ScaleUp)
    for other in "bc":
        assert decided(view, BUSY, by=other) == Keep("not_the_oldest", "a has held it longer")


def test_of_copies_claimed_at_the_same_instant_the_first_id_decides() -> None:
    view = view_of(
        model(),
        *(instance(i) for i in "xyz"),
        *(copy("m", i, claimed_at_ms=5) for i in ("z", "y")),
    )
    assert decider(view, "m") == "y"


def test_who_has_no_loaded_copy_decides_nothing() -> None:
    view = view_of(model(), instance("a"), instance("b"), copy("m", "a", LOADING))
    assert decider(view, "m") == ""
    assert decided(view, BUSY) == Keep("not_here")
    assert decided(view, BUSY, by="b") == Keep("not_here")


def test_a_draining_instance_decides_nothing_and_its_copy_does_not_count() -> None:
    leaving = copy("m", "z", claimed_at_ms=0)
    view = view_with(1, instance("z", DRAINING), leaving)
    assert decider(view, "m") == "a"
    assert decided(view, BUSY, by="z") == Keep("not_here")
    assert decided(view, REGULAR).__class__ is ScaleUp  # a is alone, whatever z still serves


def test_nothing_is_decided_while_a_copy_is_being_loaded() -> None:
    coming = copy("m", "l", LOADING, claimed_at_ms=NOW)
    assert decided(view_with(1, coming), BUSY) == Keep("load_under_way")
    view = view_with(1)
    view.add_pending("m", "b", size_bytes=10, now_ms=NOW)
    assert decided(view, BUSY) == Keep("load_under_way")


# ---- more, by rate, concurrency and what waits ---------------------------------------------------


def test_a_copy_with_more_requests_a_minute_than_the_threshold_gets_company() -> None:
    decision = decided(view_with(1), BUSY)
    assert isinstance(decision, ScaleUp)
    assert (decision.reason, len(decision.placements)) == ("rate", 1)
    assert decision.placement.instance_id != "a"


def test_at_the_threshold_nothing_is_added() -> None:
    assert decided(view_with(1), replace(BUSY, requests_per_minute=RATE)) == Keep("enough")


def test_requests_in_flight_over_the_share_of_what_a_copy_takes_at_once_call_for_one_more() -> None:
    slow = CopyUse(concurrency=9.5, latency_ms=3_000, max_concurrency=10, last_used_at_ms=NOW)
    decision = decided(view_with(1), slow)
    assert isinstance(decision, ScaleUp)
    assert decision.reason == "concurrency"
    assert "3000 ms each" in decision.detail
    assert decided(view_with(1), replace(slow, concurrency=9.0)) == Keep("enough")


def test_requests_that_wait_call_for_one_more_though_none_has_been_answered() -> None:
    stuck = CopyUse(in_flight=11, max_concurrency=10, last_used_at_ms=NOW)
    decision = decided(view_with(1), stuck)
    assert isinstance(decision, ScaleUp)
    assert decision.reason == "queue"


def test_a_model_that_needs_many_copies_gets_twice_as_many_at_once_at_most() -> None:
    storm = replace(BUSY, requests_per_minute=50 * RATE)
    one, two = decided(view_with(1), storm), decided(view_with(2), storm)
    assert isinstance(one, ScaleUp)
    assert isinstance(two, ScaleUp)
    assert (len(one.placements), len(two.placements)) == (1, 2)
    assert len({p.instance_id for p in two.placements} | {"a", "b"}) == 4


def test_one_decision_adds_no_more_than_its_bound() -> None:
    policy = replace(POLICY, scale_up_copies_max=2, copies_max_share=1.0)
    storm = replace(BUSY, requests_per_minute=50 * RATE)
    decision = decided(view_with(4), storm, policy=policy)
    assert isinstance(decision, ScaleUp)
    assert len(decision.placements) == 2


def test_it_gets_what_its_rate_takes_and_no_more() -> None:
    policy = replace(POLICY, copies_max_share=1.0)
    third = replace(BUSY, requests_per_minute=1.25 * RATE)
    decision = decided(view_with(4), third, policy=policy)  # five would do
    assert isinstance(decision, ScaleUp)
    assert len(decision.placements) == 1


def test_copies_take_at_most_a_share_of_the_instances_that_can_hold_it() -> None:
    small = [instance(f"small{n}", capacity=5) for n in range(12)]
    other = [instance(f"other{n}", model_types=("sklearn",)) for n in range(12)]
    labelled = [instance(f"l{n}", labels=("gpu",)) for n in range(12)]
    view = view_with(4, *small, *other)  # a third of twelve
    assert decided(view, BUSY) == Keep("copies_share", "4 copies, 12 instances can hold it")
    assert isinstance(decided(view_with(4, *labelled), BUSY), ScaleUp)


def test_two_copies_are_fine_however_few_the_instances() -> None:
    assert isinstance(decided(view_with(1, instances=2), BUSY), ScaleUp)
    assert decided(view_with(2, instances=3), BUSY).__class__ is Keep


def test_nothing_is_added_so_soon_after_the_last_copy_came() -> None:
    young = copy("m", "l", loaded_at_ms=NOW - POLICY.scale_up_cooldown_ms + 1, claimed_at_ms=NOW)
    old = replace(young, loaded_at_ms=NOW - POLICY.scale_up_cooldown_ms)
    assert decided(view_with(1, young), BUSY).__class__ is Keep
    assert isinstance(decided(view_with(1, old), BUSY), ScaleUp)


def test_nothing_is_added_so_soon_after_a_copy_went() -> None:
    assert decided(view_with(1), replace(BUSY, changed_at_ms=NOW - 1)).__class__ is Keep


def test_where_there_is_no_place_it_stays_and_says_why() -> None:
    view = view_with(1, failure("m", "b", failed_at_ms=NOW - 1, expires_at_ms=NOW + 1), instances=2)
    decision = decided(view, BUSY)
    assert isinstance(decision, Keep)
    assert decision.reason in ("all_excluded", "load_failed")
    assert decision.detail


# ---- a second copy for models in regular use -----------------------------------------------------


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        pytest.param((NOW - 10 * MINUTE, NOW), True, id="used now and ten minutes ago"),
        pytest.param((NOW,), False, id="used now for the first time"),
        pytest.param((NOW - 6 * MINUTE, NOW), False, id="used now and too short a while ago"),
        pytest.param((NOW - 41 * MINUTE, NOW), False, id="used now and too long ago"),
        pytest.param(
            (NOW - 41 * MINUTE, NOW - 30 * MINUTE, NOW), True, id="used three times, one in time"
        ),
    ],
)
def test_a_model_in_regular_use_gets_a_second_copy(noted: tuple[int, ...], expected: bool) -> None:
    decision = decided(view_with(1), replace(REGULAR, noted_uses=noted))
    assert isinstance(decision, ScaleUp) == expected
    if isinstance(decision, ScaleUp):
        assert decision.reason == "second_copy"


def test_regular_use_that_has_ended_calls_for_nothing() -> None:
    use = replace(REGULAR, last_used_at_ms=NOW - MINUTE)
    assert not in_regular_use(use, NOW, POLICY)
    assert decided(view_with(1), use) == Keep("enough")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"used_bytes": 80}, True, id="a tenth is free beyond the unload buffers"),
        pytest.param({"used_bytes": 81}, False, id="less than that is free and all is in use"),
        pytest.param(
            {"used_bytes": 100, "lru_at_ms": NOW - 20 * HOUR}, True, id="what would go is old"
        ),
        pytest.param(
            {"used_bytes": 100, "lru_at_ms": NOW - 19 * HOUR}, False, id="it is not old enough"
        ),
    ],
)
def test_the_second_copy_comes_only_where_that_costs_nobody_much(
    fields: dict[str, int], expected: bool
) -> None:
    decision = decided(view_with(1, **fields), REGULAR)
    assert isinstance(decision, ScaleUp) == expected
    if isinstance(decision, Keep):
        assert decision.reason == "no_memory"


def test_regular_use_alone_never_brings_a_third() -> None:
    assert decided(view_with(2), REGULAR) == Keep("enough")


def test_uses_are_noted_once_a_stretch_and_forgotten_in_time() -> None:
    noted: tuple[int, ...] = ()
    for at_ms in range(0, 3 * HOUR, 10_000):
        noted = note_use(noted, at_ms, POLICY)
    least, most = POLICY.second_copy_min_age_ms, POLICY.second_copy_max_age_ms
    assert all(b - a >= least for a, b in pairwise(noted))
    assert 3 * HOUR - 10_000 - noted[0] <= most
    assert len(noted) <= most // least + 1


# ---- fewer ---------------------------------------------------------------------------------------


def test_a_copy_beyond_two_goes_when_the_others_would_carry_its_load_with_ease() -> None:
    easy = replace(RESTING, requests_per_minute=0.66 * RATE * 2 / 3)
    decision = decided(view_with(3), easy)
    assert isinstance(decision, ScaleDown)
    assert (decision.instance_id, decision.reason) == ("c", "low_rate")  # the last one that came
    more = replace(easy, requests_per_minute=0.66 * RATE * 2 / 3 + 1)
    assert decided(view_with(3), more) == Keep("enough")


def test_slow_requests_keep_a_copy_as_many_requests_do() -> None:
    assert decided(view_with(3), replace(RESTING, concurrency=5)) == Keep("enough")
    assert decided(view_with(3), replace(RESTING, in_flight=5)) == Keep("enough")
    assert isinstance(decided(view_with(3), replace(RESTING, concurrency=3)), ScaleDown)


def test_nothing_goes_so_soon_after_the_last_one_came_or_went() -> None:
    late = NOW - POLICY.scale_down_cooldown_ms + 1
    young = copy("m", "l", loaded_at_ms=late, claimed_at_ms=late)
    assert decided(view_with(2, young), RESTING).__class__ is Keep
    assert decided(view_with(3), replace(RESTING, changed_at_ms=late)).__class__ is Keep
    assert isinstance(decided(view_with(3), replace(RESTING, changed_at_ms=late - 1)), ScaleDown)


@pytest.mark.parametrize(
    ("idle_ms", "used_bytes", "reason"),
    [
        pytest.param(HOUR, 0, "idle", id="unused for an hour it goes from an empty mesh too"),
        pytest.param(HOUR - 1, 0, "", id="before that it stays while there is memory"),
        pytest.param(
            10 * MINUTE, 96, "idle_memory_short", id="after ten minutes when memory is short"
        ),
        pytest.param(10 * MINUTE - 1, 96, "", id="before that it stays when memory is short"),
        pytest.param(10 * MINUTE, 85, "", id="a twentieth beyond the unload buffer is not short"),
    ],
)
def test_a_second_copy_goes_when_idle(idle_ms: int, used_bytes: int, reason: str) -> None:
    use = replace(RESTING, last_used_at_ms=NOW - idle_ms)
    decision = decided(view_with(2, used_bytes=used_bytes), use)
    if reason:
        assert isinstance(decision, ScaleDown)
        assert (decision.instance_id, decision.reason) == ("b", reason)
    else:
        assert decision == Keep("enough")


def test_the_last_copy_never_goes() -> None:
    assert decided(view_with(1), replace(RESTING, last_used_at_ms=0)) == Keep("enough")


def test_copies_never_go_below_the_minimum() -> None:
    record = model(min_copies=3)
    assert isinstance(decided(view_with(4), RESTING, record=record), ScaleDown)
    assert decided(view_with(3), RESTING, record=record).__class__ is Keep
    pair = model(min_copies=2)
    idle = replace(RESTING, last_used_at_ms=0)
    assert decided(view_with(2), idle, record=pair).__class__ is Keep


def test_a_pinned_copy_never_goes() -> None:
    pinned = copy("m", "l", pinned=True, claimed_at_ms=NOW - HOUR)
    decision = decided(view_with(2, pinned), RESTING)
    assert isinstance(decision, ScaleDown)
    assert decision.instance_id == "b"
    idle = replace(RESTING, last_used_at_ms=0)
    assert decided(view_with(1, pinned), idle) == Keep("pinned")


def test_what_goes_leaves_the_zones_as_even_as_it_can() -> None:
    zones = {"a": "x", "b": "y", "c": "x"}
    records = [copy("m", i, claimed_at_ms=n) for n, i in enumerate("acb")]  # b came last
    view = view_of(model(), *(instance(i, zone=z) for i, z in zones.items()), *records)
    decision = decided(view, RESTING)
    assert isinstance(decision, ScaleDown)
    assert decision.instance_id == "c"


def test_what_goes_is_where_memory_is_shortest() -> None:
    used = {"a": 0, "b": 90, "c": 50}
    records = [copy("m", i, claimed_at_ms=n) for n, i in enumerate("abc")]
    view = view_of(model(), *(instance(i, used_bytes=n) for i, n in used.items()), *records)
    decision = decided(view, RESTING)
    assert isinstance(decision, ScaleDown)
    assert decision.instance_id == "b"


def test_duplicates_left_by_an_outage_are_trimmed_one_at_a_time_down_to_two() -> None:
    view, went = view_with(5), []
    use, now_ms = RESTING, NOW
    while isinstance(
        found := scale(view, model(), "a", use, now_ms=now_ms, policy=POLICY), ScaleDown
    ):
        went.append(found.instance_id)
        view.delete_copy("m", found.instance_id)
        use = replace(use, changed_at_ms=now_ms)
        assert scale(view, model(), "a", use, now_ms=now_ms, policy=POLICY).__class__ is Keep
        now_ms += POLICY.scale_down_cooldown_ms
        use = replace(use, last_used_at_ms=now_ms)
    assert went == ["e", "d", "c"]


# ---- what need not be read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "copies", "used_bytes", "expected"),
    [
        pytest.param(BUSY, 1, 0, "hot", id="a busy copy is worth reading"),
        pytest.param(REGULAR, 1, 0, "regular", id="one in regular use, where there is memory"),
        pytest.param(REGULAR, 1, 99, "", id="not where there is none"),
        pytest.param(REGULAR, 2, 0, "", id="nor when it has a second copy"),
        pytest.param(RESTING, 1, 0, "", id="one that rests is not"),
        pytest.param(RESTING, 3, 0, "fewer", id="three that rest are"),
        pytest.param(RESTING, 2, 0, "", id="two that have not rested for long are not"),
        pytest.param(
            replace(RESTING, last_used_at_ms=NOW - HOUR), 2, 0, "fewer", id="two that have are"
        ),
    ],
)
def test_copies_are_read_only_when_that_may_come_to_something(
    use: CopyUse, copies: int, used_bytes: int, expected: str
) -> None:
    view = view_with(copies, used_bytes=used_bytes)
    memory = memory_of(view, NOW, POLICY)
    assert worth_reading(use, copies, memory, now_ms=NOW, policy=POLICY) == expected
    acts = not isinstance(decided(view, use), Keep)
    assert acts == bool(expected)
