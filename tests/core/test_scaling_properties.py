"""What holds of scaling whatever the mesh looks like."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mesh.core.policy import Policy
from mesh.core.scaling import CopyUse, Keep, ScaleDown, ScaleUp, Scaling, decider, scale
from mesh.core.types import CopyState, InstanceState, ModelRecord
from mesh.core.view import ClusterView
from tests.core.cluster import copy, instance, model, view_of

NOW = 10_000_000_000
DAY = 86_400_000
POLICY = Policy(default_model_size_bytes=10)
NAMES = [f"i{n}" for n in range(8)]

ages_ms = st.one_of(st.integers(0, 200_000), st.integers(0, 2 * DAY))
instances = st.builds(
    lambda name, state, used, lru_age_ms, zone: instance(
        name, state, used_bytes=used, lru_at_ms=NOW - lru_age_ms, zone=zone
    ),
    st.sampled_from(NAMES),
    st.sampled_from([InstanceState.READY] * 4 + [InstanceState.DRAINING, InstanceState.STARTING]),
    st.integers(0, 100),
    ages_ms,
    st.sampled_from(["", "x", "y"]),
)
copies = st.builds(
    lambda name, state, claimed_ago, pinned: copy(
        "m",
        name,
        state,
        claimed_at_ms=NOW - claimed_ago,
        loaded_at_ms=NOW - claimed_ago,
        pinned=pinned,
    ),
    st.sampled_from(NAMES),
    st.sampled_from([CopyState.LOADED] * 5 + [CopyState.LOADING]),
    ages_ms,
    st.booleans(),
)
uses = st.builds(
    CopyUse,
    requests_per_minute=st.one_of(st.just(0.0), st.floats(0, 20_000)),
    concurrency=st.floats(0, 40),
    latency_ms=st.floats(0, 1_000),
    in_flight=st.integers(0, 40),
    max_concurrency=st.integers(1, 64),
    last_used_at_ms=ages_ms.map(lambda ms: NOW - ms),
    noted_uses=st.lists(ages_ms, max_size=4).map(
        lambda ages: tuple(sorted(NOW - ms for ms in ages))
    ),
    changed_at_ms=ages_ms.map(lambda ms: NOW - ms),
)
views = st.builds(
    lambda there, held: view_of(
        model(),
        *{i.instance_id: i for i in there}.values(),
        *{c.instance_id: c for c in held}.values(),
    ),
    st.lists(instances, min_size=1, max_size=8),
    st.lists(copies, max_size=8),
)
records = st.builds(
    lambda minimum, pinned: model(min_copies=minimum, pinned=pinned),
    st.integers(0, 4),
    st.booleans(),
)


def by_all(view: ClusterView, record: ModelRecord, use: CopyUse) -> dict[str, Scaling]:
    return {i: scale(view, record, i, use, now_ms=NOW, policy=POLICY) for i in view.instances}


@given(views, records, uses)
def test_of_all_instances_at_most_one_acts_and_it_is_the_decider(
    view: ClusterView, record: ModelRecord, use: CopyUse
) -> None:
    acting = [i for i, found in by_all(view, record, use).items() if not isinstance(found, Keep)]
    assert len(acting) <= 1
    assert all(i == decider(view, "m") and view.instances[i].ready for i in acting)


@given(views, records, uses)
def test_the_same_inputs_give_the_same_decision(
    view: ClusterView, record: ModelRecord, use: CopyUse
) -> None:
    assert by_all(view, record, use) == by_all(view, record, use)


@given(views, records, uses)
def test_what_is_decided_is_allowed(view: ClusterView, record: ModelRecord, use: CopyUse) -> None:
    ready = [c for c in view.copies_of("m") if view.instances[c.instance_id].ready]
    for instance_id, found in by_all(view, record, use).items():
        match found:
            case ScaleUp():
                chosen = [placement.instance_id for placement in found.placements]
                assert len(set(chosen)) == len(chosen) <= min(len(ready), 8)
                assert not set(chosen) & {c.instance_id for c in view.copies_of("m")}
                assert all(view.instances[i].ready for i in chosen)
            case ScaleDown():
                (gone,) = (c for c in ready if c.instance_id == found.instance_id)
                assert not gone.pinned
                assert gone.instance_id != instance_id
                assert len(ready) - 1 >= max(1, record.min_copies)


@given(views, records, uses)
def test_after_its_own_action_the_same_inputs_give_keep(
    view: ClusterView, record: ModelRecord, use: CopyUse
) -> None:
    """Right after, and when every pause has passed: nothing comes and goes for ever."""
    holder = decider(view, "m")
    found = scale(view, record, holder, use, now_ms=NOW, policy=POLICY)
    match found:
        case ScaleUp():
            for placement in found.placements:
                view.put_copy(copy("m", placement.instance_id, claimed_at_ms=NOW, loaded_at_ms=NOW))
        case ScaleDown():
            view.delete_copy("m", found.instance_id)
        case Keep():
            return
    changed = replace(use, changed_at_ms=NOW)
    again = scale(view, record, holder, changed, now_ms=NOW, policy=POLICY)
    assert isinstance(again, Keep)
    # The model goes on being used as it was; the copies share what they had.
    before = len(view.copies_of("m")) + (1 if isinstance(found, ScaleDown) else 0)
    if isinstance(found, ScaleUp):
        before -= len(found.placements)
    share = before / len(view.copies_of("m"))
    later_ms = 10 * 60_000
    settled = replace(
        changed,
        requests_per_minute=use.requests_per_minute * share,
        concurrency=use.concurrency * share,
        in_flight=int(use.in_flight * share),
        last_used_at_ms=use.last_used_at_ms + later_ms,
        noted_uses=tuple(at_ms + later_ms for at_ms in use.noted_uses),
    )
    after = scale(view, record, holder, settled, now_ms=NOW + later_ms, policy=POLICY)
    if isinstance(found, ScaleUp):
        assert not isinstance(after, ScaleDown)
    else:
        assert not isinstance(after, ScaleUp)
