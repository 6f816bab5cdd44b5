"""Which replica set is the newest of its group: as a search over all instances says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.policy import Policy
from mesh.core.replacement import NewestSet, arriving_sets
from mesh.core.types import InstanceRecord, InstanceState
from mesh.core.view import ClusterView
from tests.core.cluster import DRAINING, NOW, READY, STARTING, instance, view_of

IDS = ("a", "b", "c", "d")
Begun = dict[tuple[str, str], int]


def member(
    instance_id: str, group: str, replica_set: str, at_ms: int, state: InstanceState = READY
) -> InstanceRecord:
    told = {"group": group, "replica_set": replica_set, "started_at_ms": at_ms}
    return instance(instance_id, state, **told)  # type: ignore[arg-type]


def newest_of(*records: InstanceRecord) -> dict[str, NewestSet]:
    return view_of(*records).replicas.newest


@pytest.mark.parametrize(
    ("records", "newest"),
    [
        pytest.param([], {}, id="nobody"),
        pytest.param([member("a", "g", "r1", 5)], {}, id="one set replaces nothing"),
        pytest.param(
            [member("a", "", "r1", 5), member("b", "", "r2", 9)], {}, id="without a group"
        ),
        pytest.param(
            [member("a", "g", "r1", 5), member("b", "h", "r2", 9)], {}, id="sets of other groups"
        ),
        pytest.param(
            [member("a", "g", "r1", 5), member("b", "g", "r2", 9), member("c", "g", "r2", 20)],
            {"g": NewestSet("r2", 9)},
            id="the set whose first instance came last, as of that instance",
        ),
        pytest.param(
            [member("a", "g", "r1", 5), member("b", "g", "r2", 9), member("c", "g", "r1", 20)],
            {"g": NewestSet("r2", 9)},
            id="an old set that restarts an instance is not newer for it",
        ),
        pytest.param(
            [member("a", "g", "r1", 5), member("b", "g", "r2", 9, STARTING)],
            {"g": NewestSet("r2", 9)},
            id="an instance that starts counts",
        ),
        pytest.param(
            [member("a", "g", "r1", 5), member("b", "g", "r2", 9, DRAINING)],
            {},
            id="an instance that drains does not",
        ),
        pytest.param(
            [member("a", "g", "r1", 5), member("b", "g", "r2", 5)],
            {"g": NewestSet("r2", 5)},
            id="two that came at once: all who look agree",
        ),
    ],
)
def test_newest(records: list[InstanceRecord], newest: dict[str, NewestSet]) -> None:
    assert newest_of(*records) == newest
    assert newest_of(*reversed(records)) == newest


def test_a_set_stays_as_old_as_its_first_instance_while_it_has_any() -> None:
    view = view_of(member("a", "g", "r1", 5), member("b", "g", "r2", 9), member("c", "g", "r2", 30))
    view.delete_instance("b")
    assert view.replicas.newest == {"g": NewestSet("r2", 9)}
    view.delete_instance("c")
    assert view.replicas.newest == {}
    view.put_instance(member("d", "g", "r2", 40))
    assert view.replicas.newest == {"g": NewestSet("r2", 40)}  # it has come again


def test_an_update_that_is_taken_back_makes_the_old_set_the_only_one() -> None:
    view = view_of(member("a", "g", "r1", 5), member("b", "g", "r2", 9))
    view.put_instance(member("b", "g", "r2", 9, DRAINING))
    assert view.replicas.newest == {}
    view.delete_instance("b")
    assert view.replicas.newest == {}


def test_a_set_arrives_for_the_window_of_the_policy() -> None:
    newest = {"g": NewestSet("r2", NOW - 10), "h": NewestSet("s2", NOW - 11)}
    policy = Policy(replacement_window_ms=11)
    assert arriving_sets(newest, NOW, policy) == {"g": "r2"}
    assert arriving_sets(newest, NOW, Policy(replacement_window_ms=0)) == {}


puts = st.builds(
    member,
    st.sampled_from(IDS),
    st.sampled_from(("", "g")),
    st.sampled_from(("r1", "r2", "r3")),
    st.integers(1, 9),
    st.sampled_from((READY, STARTING, DRAINING)),
)
steps = st.lists(st.one_of(puts, st.sampled_from(IDS)), max_size=14)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_the_index_says_what_a_search_says(sequence: list[InstanceRecord | str]) -> None:
    view = ClusterView()
    begun: Begun = {}
    for step in sequence:
        if isinstance(step, str):
            view.delete_instance(step)
        else:
            view.put_instance(step)
        there = [
            s.record
            for s in view.instances.values()
            if s.record.group and s.record.state is not DRAINING
        ]
        alive = {(r.group, r.replica_set) for r in there}
        begun = {key: at_ms for key, at_ms in begun.items() if key in alive}
        for r in there:
            key = (r.group, r.replica_set)
            begun[key] = min(begun.get(key, r.started_at_ms), r.started_at_ms)
        expected = {}
        if len(begun) > 1:
            at_ms, (_, replica_set) = max((at_ms, key) for key, at_ms in begun.items())
            expected = {"g": NewestSet(replica_set, at_ms)}
        assert view.replicas.newest == expected
