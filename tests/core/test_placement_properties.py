"""What holds for every placement, whatever the cluster looks like."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.placement import NoPlacement, Placement, candidates, place
from mesh.core.types import InstanceRecord, ModelRecord
from mesh.core.view import ClusterView
from tests.core.cluster import (
    DRAINING,
    LOADED,
    LOADING,
    NOW,
    POLICY,
    READY,
    STARTING,
    Record,
    copy,
    failure,
    instance,
    model,
    view_of,
)

IDS = ("a", "b", "c", "d", "e")
ids = st.sampled_from(IDS)
instances = st.builds(
    lambda i, state, capacity, used, loading, lru, types: instance(
        i,
        state,
        capacity,
        used_bytes=used,
        loading_count=loading,
        lru_at_ms=lru,
        model_types=types,
    ),
    ids,
    st.sampled_from((READY, READY, READY, STARTING, DRAINING)),
    st.integers(0, 60),
    st.integers(0, 80),
    st.integers(0, 3),
    st.integers(0, NOW),
    st.sampled_from((("onnx",), ("onnx", "sklearn"), ("sklearn",))),
)
clusters = st.tuples(
    st.lists(instances, max_size=5),
    st.lists(
        st.builds(
            copy,
            st.sampled_from(("m", "n", "o")),
            ids,
            st.sampled_from((LOADED, LOADING)),
            st.integers(0, 40),
        ),
        max_size=6,
    ),
    st.lists(st.builds(failure, st.just("m"), ids), max_size=2),
    st.lists(st.tuples(st.sampled_from(("n", "p")), ids, st.integers(1, 30)), max_size=4),
)
wanted = st.builds(
    lambda size, kind: model(size_bytes_stated=size, model_type=kind),
    st.integers(1, 70),
    st.sampled_from(("onnx", "sklearn")),
)
Cluster = tuple[list[Record], list[Record], list[Record], list[tuple[str, str, int]]]


def build(cluster: Cluster, one: ModelRecord, order: random.Random | None = None) -> ClusterView:
    """The same cluster in the order drawn, or as it came."""
    distinct = {r.instance_id: r for r in cluster[0] if isinstance(r, InstanceRecord)}
    records: list[Record] = [one, *distinct.values(), *cluster[1], *cluster[2]]
    asked = {(m, i): size for m, i, size in cluster[3]}
    pending = list(asked.items())
    if order is not None:
        by_key = {
            repr((type(r), getattr(r, "model_id", ""), getattr(r, "instance_id", ""))): r
            for r in records
        }
        records = list(by_key.values())
        order.shuffle(records)
        order.shuffle(pending)
    view = view_of(*records)
    for (m, i), size in pending:
        view.add_pending(m, i, size_bytes=size, now_ms=NOW)
    return view


@settings(max_examples=300, deadline=None)
@given(clusters, wanted, st.sets(ids, max_size=3), st.randoms(use_true_random=False))
def test_rules(cluster: Cluster, one: ModelRecord, exclude: set[str], order: random.Random) -> None:
    view = build(cluster, one)
    found = place(view, one, now_ms=NOW, policy=POLICY, exclude=exclude)
    assert place(view, one, now_ms=NOW, policy=POLICY, exclude=exclude) == found  # deterministic
    shuffled = build(cluster, one, order)
    assert place(shuffled, one, now_ms=NOW, policy=POLICY, exclude=exclude) == found
    told = candidates(shuffled, one, now_ms=NOW, policy=POLICY, exclude=exclude)
    eligible = [c.instance_id for c in told if c.refusal is None]
    if isinstance(found, NoPlacement):
        assert eligible == []
        assert found.detail and found.reason
        return
    holds(found, view, one, exclude)
    assert eligible[0] == found.instance_id
    assert (eligible[1] if len(eligible) > 1 else None) == found.runner_up


def holds(found: Placement, view: ClusterView, one: ModelRecord, exclude: set[str]) -> None:
    """Everything that a chosen instance must be."""
    slot = view.instances[found.instance_id]
    size = one.size_bytes_stated
    assert size is not None
    assert found.instance_id not in exclude
    assert slot.record.state is READY
    assert one.model_type in slot.record.model_types
    assert one.model_id not in slot.copies
    assert size <= slot.record.capacity_bytes
    assert found.instance_id not in {f.instance_id for f in view.failures_of("m", NOW)}
    if not found.full:
        assert size <= slot.effective_free_bytes
        assert slot.effective_used_bytes + size <= slot.record.capacity_bytes
