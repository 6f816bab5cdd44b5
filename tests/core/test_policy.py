"""What a threshold may be, and how one is overridden."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.errors import InvalidArgument
from mesh.core.policy import Policy, overridden
from mesh.policy_reasons import reasons, thresholds

TAKEN = [
    ("a whole number", {"load_slots": 4}),
    ("several at once", {"load_slots": 4, "drain_moves": 2}),
    ("a share", {"proactive_free_share": 0.5}),
    ("a whole number where a share is meant", {"proactive_free_share": 1}),
    ("nothing at all, where that switches it off", {"idle_unload_ms": 0, "proactive_loads_max": 0}),
    ("an eviction order", {"eviction_order": "frequency"}),
    ("both ends of a range that moves as a whole",
     {"second_copy_min_age_ms": 3_000_000, "second_copy_max_age_ms": 4_000_000}),
    ("nothing", {}),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "overrides"), TAKEN, ids=[row[0] for row in TAKEN])
def test_an_override_changes_what_it_names_and_nothing_else(
    sentence: str, overrides: dict[str, object]
) -> None:
    base = Policy()
    changed = overridden(base, overrides)
    differing = {
        f.name for f in fields(Policy) if getattr(changed, f.name) != getattr(base, f.name)
    }
    assert {name: getattr(changed, name) for name in overrides} == overrides
    assert differing <= overrides.keys()
    for item in fields(Policy):
        assert type(getattr(changed, item.name)).__name__ == item.type


REFUSED = [
    ("a name that is nearly one is put right",
     {"load_slot": 4}, ["policy.load_slot:", "did you mean load_slots?"]),
    ("a name that is none sends to the list",
     {"zzz": 1}, ["policy.zzz:", "`mesh policy`"]),
    ("no load slot at all",
     {"load_slots": 0}, ["policy.load_slots:", "from 1 to 64", "found 0"]),
    ("too many of them",
     {"load_slots": 65}, ["policy.load_slots:", "from 1 to 64", "found 65"]),
    ("a text for a number",
     {"load_slots": "4"}, ["policy.load_slots:", "a whole number", "found '4'"]),
    ("a truth value is no number",
     {"load_slots": True}, ["policy.load_slots:", "found True"]),
    ("a truth value is no share",
     {"proactive_free_share": False}, ["policy.proactive_free_share:", "found False"]),
    ("a broken number for a whole one",
     {"load_slots": 2.5}, ["policy.load_slots:", "a whole number", "found 2.5"]),
    ("nothing where a number is meant",
     {"load_slots": None}, ["policy.load_slots:", "found None"]),
    ("a share above one",
     {"proactive_free_share": 1.01}, ["policy.proactive_free_share:", "from 0 to 1", "1.01"]),
    ("a share below zero",
     {"min_copies_capacity_share": -0.1}, ["policy.min_copies_capacity_share:", "-0.1"]),
    ("not a number",
     {"proactive_free_share": float("nan")}, ["policy.proactive_free_share:", "nan"]),
    ("an infinite factor",
     {"hot_factor": float("inf")}, ["policy.hot_factor:", "inf"]),
    ("a time below zero",
     {"idle_unload_ms": -1}, ["policy.idle_unload_ms:", "from 0 to", "found -1"]),
    ("a period of nothing would spin",
     {"leader_sweep_ms": 0}, ["policy.leader_sweep_ms:", "from 1 to", "found 0"]),
    ("a lease that etcd cannot give",
     {"instance_lease_ttl_ms": 500}, ["policy.instance_lease_ttl_ms:", "1000", "found 500"]),
    ("a batch that no transaction holds",
     {"repair_batch_max": 129}, ["policy.repair_batch_max:", "from 1 to 128"]),
    ("a number beyond all sense",
     {"load_timeout_ms": 10**400}, ["policy.load_timeout_ms:", "to 10^12"]),
    ("an eviction order that is not there",
     {"eviction_order": "fifo"}, ["policy.eviction_order:", "lru, frequency", "'fifo'"]),
    ("a number for an eviction order",
     {"eviction_order": 1}, ["policy.eviction_order:", "lru, frequency", "found 1"]),
    ("the least unload buffer above the largest",
     {"unload_buffer_min_share": 0.2},
     ["policy.unload_buffer_min_share:", "at most unload_buffer_max_share", "0.1", "found 0.2"]),
    ("the earliest second use after the latest",
     {"second_copy_max_age_ms": 1},
     ["policy.second_copy_min_age_ms:", "second_copy_max_age_ms", "which is 1", "420000"]),
    ("second copies that would go sooner than they come",
     {"second_copy_free_share": 0.01},
     ["policy.scale_down_free_share:", "second_copy_free_share", "0.01"]),
    ("a first pause above the longest",
     {"placement_retry_ms": 2_000}, ["policy.placement_retry_ms:", "placement_retry_max_ms"]),
    ("a first ejection above the longest",
     {"outlier_eject_ms": 60_000}, ["policy.outlier_eject_ms:", "outlier_eject_max_ms"]),
    ("adverts whose least pause is above the greatest",
     {"advert_max_interval_ms": 100}, ["policy.advert_min_interval_ms:", "advert_max_interval_ms"]),
    ("a short idle time above the long one",
     {"second_copy_idle_ms": 1}, ["policy.second_copy_idle_short_ms:", "second_copy_idle_ms"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sentence", "overrides", "said"), REFUSED, ids=[row[0] for row in REFUSED]
)
def test_what_cannot_be_is_refused_by_name(
    sentence: str, overrides: dict[str, object], said: list[str]
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        overridden(Policy(), overrides)
    assert [text for text in said if text not in caught.value.message] == []


def test_a_policy_that_is_built_directly_is_checked_too() -> None:
    with pytest.raises(InvalidArgument, match="load_slots"):
        Policy(load_slots=0)


VALUES = st.one_of(
    st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.none(), st.just([1])
)


@given(st.dictionaries(st.sampled_from([f.name for f in fields(Policy)]), VALUES, max_size=4))
def test_any_value_is_taken_as_it_is_or_refused_by_name(overrides: dict[str, object]) -> None:
    try:
        changed = overridden(Policy(), overrides)
    except InvalidArgument as error:
        assert error.message.startswith("policy.")
    else:
        assert {name: getattr(changed, name) for name in overrides} == overrides


# ---- the reasons ---------------------------------------------------------------------------------


def test_every_threshold_has_a_reason_a_default_and_what_is_expected() -> None:
    told = {threshold.name: threshold for threshold in thresholds()}
    assert list(told) == [f.name for f in fields(Policy)]
    assert [name for name, one in told.items() if len(one.reason) < 20] == []
    assert told["load_slots"].default == Policy().load_slots
    assert told["load_slots"].expected == "a whole number from 1 to 64"
    assert told["proactive_free_share"].unit == "share"
    assert told["idle_unload_ms"].unit == "ms"
    assert told["proactive_quiet_ms"].group == "proactive loading"


def test_reasons_are_read_from_comments_over_one_or_more_lines_and_fields() -> None:
    source = '''
class Policy:
    """Docs."""

    # One.
    a_ms: int = 1
    # Two, over
    # two lines ...
    b: float = 0.5
    c: int = 1
    # ... with an end.
    d: int = 2

    # ---- a heading ----------
    # Three ...
    e: str = "x"
    # ... and four ...
    f: int = 1
    # ... and five.
    g: int = 1
'''
    assert reasons(source) == {
        "a_ms": ("", "One."),
        "b": ("", "Two, over two lines"),
        "c": ("", "Two, over two lines"),
        "d": ("", "Two, over two lines ... with an end."),
        "e": ("a heading", "Three"),
        "f": ("a heading", "Three ... and four"),
        "g": ("a heading", "Three ... and five."),
    }
