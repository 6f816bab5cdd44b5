"""What holds for every placement, whatever the cluster looks like."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.demand import demand_of, fitting
from mesh.core.placement import Candidate, NoPlacement, Placement, candidates, place
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
    lambda i, state, capacity, used, loading, lru, types, soft: instance(
        i,
        state,
        capacity,
        used_bytes=used,
        loading_count=loading,
        lru_at_ms=lru,
        model_types=types,
        **soft,
    ),
    ids,
    st.sampled_from((READY, READY, READY, STARTING, DRAINING)),
    st.integers(0, 60),
    st.integers(0, 80),
    st.integers(0, 3),
    st.integers(0, NOW),
    st.sampled_from((("onnx",), ("onnx", "sklearn"), ("sklearn",))),
    st.fixed_dictionaries(
        {},
        optional={
            "labels": st.sampled_from((("gpu",), ("big",), ("gpu", "big"))),
            "zone": st.sampled_from(("z1", "z2")),
            "group": st.just("g"),
            "replica_set": st.sampled_from(("r1", "r2")),
            "started_at_ms": st.sampled_from((1, NOW - 5)),
            "requests_per_minute": st.sampled_from((1, 7_000, 20_000)),
            "victim_score": st.sampled_from((270.0, 270.1, 275.0)),
        },
    ),
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
    lambda size, kind, required, preferred: model(
        size_bytes_stated=size,
        model_type=kind,
        required_labels=required,
        preferred_labels=preferred,
    ),
    st.integers(1, 70),
    st.sampled_from(("onnx", "sklearn")),
    st.sampled_from(((), (), ("gpu",))),
    st.sampled_from(((), ("big",), ("big", "gpu"))),
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


@settings(max_examples=400, deadline=None)
@given(
    clusters,
    wanted,
    st.sets(ids, max_size=3),
    st.sets(ids, max_size=3),
    st.randoms(use_true_random=False),
)
def test_rules(
    cluster: Cluster, one: ModelRecord, exclude: set[str], avoid: set[str], order: random.Random
) -> None:
    asked = {"now_ms": NOW, "policy": POLICY, "exclude": exclude, "avoid": avoid}
    view = build(cluster, one)
    found = place(view, one, **asked)  # type: ignore[arg-type]
    assert place(view, one, **asked) == found  # type: ignore[arg-type]  # deterministic
    shuffled = build(cluster, one, order)
    assert place(shuffled, one, **asked) == found  # type: ignore[arg-type]
    told = candidates(shuffled, one, **asked)  # type: ignore[arg-type]
    eligible = [c.instance_id for c in told if c.refusal is None]
    demand = demand_of(view, one, now_ms=NOW, policy=POLICY, exclude=exclude)
    assert {s.record.instance_id for s in fitting(view, demand)} == set(eligible)
    if isinstance(found, NoPlacement):
        assert eligible == []
        assert found.detail and found.reason
        return
    holds(found, view, one, exclude)
    assert eligible[0] == found.instance_id
    assert (eligible[1] if len(eligible) > 1 else None) == found.runner_up
    nobody_else(found, told, avoid)


def nobody_else(found: Placement, told: tuple[Candidate, ...], avoid: set[str]) -> None:
    """What is held against the chosen one is held against all that come before it matters."""
    free = [c for c in told if c.refusal is None]
    if found.instance_id in avoid:
        assert all(c.instance_id in avoid for c in free)
        return
    answering = [c for c in free if c.instance_id not in avoid]
    if "being_replaced" in found.marks:
        assert all("being_replaced" in c.marks for c in answering)
        return
    staying = [c for c in answering if "being_replaced" not in c.marks]
    if found.full:  # room is not worth a queue: one with room may have its load slots in use
        assert all(c.full or c.loads_in_progress > 0 for c in staying)
    elif "not_preferred" in found.marks:
        assert all(c.full or "not_preferred" in c.marks for c in staying)


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
    assert set(one.required_labels) <= set(slot.record.labels)
    assert one.model_id not in slot.pending
    assert found.instance_id not in {f.instance_id for f in view.failures_of("m", NOW)}
    if not found.full:
        assert size <= slot.effective_free_bytes
        assert slot.effective_used_bytes + size <= slot.record.capacity_bytes
