"""The view's indexes against a dumb model that keeps plain dictionaries and searches them."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.types import (
    CopyRecord,
    CopyState,
    InstanceRecord,
    InstanceState,
    ModelRecord,
    VModelRecord,
)
from mesh.core.view import ClusterView
from tests.core.cluster import DRAINING, LOADED, LOADING, NOW, READY, copy, instance, model, vmodel

MODELS = ("m0", "m1", "m2")
NAMES = ("v0", "v1", "m1")  # one of them is a model's id too
INSTANCES = ("a", "b", "c")

models = st.sampled_from(MODELS)
instances = st.sampled_from(INSTANCES)
put_model = st.builds(
    lambda m, auto, least, pinned: model(m, auto_delete=auto, min_copies=least, pinned=pinned),
    models,
    st.booleans(),
    st.sampled_from((0, 2)),
    st.booleans(),
)
put_vmodel = st.builds(vmodel, st.sampled_from(NAMES), models, models)
put_instance = st.builds(
    lambda i, state, used: instance(i, state, used_bytes=used),
    instances,
    st.sampled_from((READY, DRAINING)),
    st.integers(0, 100),
)
put_copy = st.builds(
    copy, models, instances, st.sampled_from((LOADED, LOADING)), st.integers(0, 40)
)
pending = st.tuples(st.just("pending"), models, instances, st.integers(0, 40))
deletion = st.one_of(
    st.tuples(st.just("model"), models),
    st.tuples(st.just("vmodel"), st.sampled_from(NAMES)),
    st.tuples(st.just("instance"), instances),
    st.tuples(st.just("copy"), models, instances),
    st.tuples(st.just("drop"), models, instances),
)
snapshot = st.one_of(
    st.tuples(st.just("models"), st.lists(put_model, max_size=3)),
    st.tuples(st.just("vmodels"), st.lists(put_vmodel, max_size=3)),
    st.tuples(st.just("instances"), st.lists(put_instance, max_size=3)),
    st.tuples(st.just("copies"), st.lists(put_copy, max_size=5)),
)
steps = st.lists(
    st.one_of(put_model, put_vmodel, put_instance, put_copy, pending, deletion, snapshot),
    max_size=40,
)


@dataclass
class Dumb:
    """The same facts, without an index."""

    models: dict[str, ModelRecord] = field(default_factory=dict)
    vmodels: dict[str, VModelRecord] = field(default_factory=dict)
    instances: dict[str, InstanceRecord] = field(default_factory=dict)
    copies: dict[tuple[str, str], CopyRecord] = field(default_factory=dict)
    pending: dict[tuple[str, str], int] = field(default_factory=dict)

    def step(self, step: object) -> None:
        match step:
            case ModelRecord():
                self.models[step.model_id] = step
            case VModelRecord():
                self.vmodels[step.name] = step
            case InstanceRecord():
                self.instances[step.instance_id] = step
            case CopyRecord():
                self.copies[step.model_id, step.instance_id] = step
            case ("pending", str(m), str(i), int(size)):
                if i in self.instances and (m, i) not in self.copies:
                    self.pending[m, i] = size
            case ("model", str(m)):
                self.models.pop(m, None)
            case ("vmodel", str(name)):
                self.vmodels.pop(name, None)
            case ("instance", str(i)):
                self.instances.pop(i, None)
            case ("copy", str(m), str(i)):
                self.copies.pop((m, i), None)
            case ("drop", str(m), str(i)):
                self.pending.pop((m, i), None)
            case ("models", list(records)):
                self.models = {r.model_id: r for r in records}
            case ("vmodels", list(records)):
                self.vmodels = {r.name: r for r in records}
            case ("instances", list(records)):
                self.instances = {r.instance_id: r for r in records}
            case ("copies", list(records)):
                self.copies = {(r.model_id, r.instance_id): r for r in records}
            case _:
                raise AssertionError(step)
        for m, i in tuple(self.pending):
            if i not in self.instances or (m, i) in self.copies:
                del self.pending[m, i]


def play(view: ClusterView, step: object) -> None:
    match step:
        case ModelRecord():
            view.put_model(step)
        case VModelRecord():
            view.put_vmodel(step)
        case InstanceRecord():
            view.put_instance(step)
        case CopyRecord():
            view.put_copy(step)
        case ("pending", str(m), str(i), int(size)):
            view.add_pending(m, i, size_bytes=size, now_ms=NOW)
        case ("drop", str(m), str(i)):
            view.drop_pending(m, i)
        case (str(what), list(records)):
            getattr(view, f"replace_{what}")(records)
        case (str(what), *keys):
            getattr(view, f"delete_{what}")(*keys)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_every_index_says_what_a_search_says(sequence: list[object]) -> None:
    view, dumb = ClusterView(), Dumb()
    for step in sequence:
        play(view, step)
        dumb.step(step)
        compare(view, dumb)


def by_key(item: tuple[tuple[str, str], CopyRecord]) -> tuple[str, str]:
    return item[0]


def compare(view: ClusterView, dumb: Dumb) -> None:
    assert view.models == dumb.models
    assert view.vmodels == dumb.vmodels
    assert {i: s.record for i, s in view.instances.items()} == dumb.instances
    visible = {k: c for k, c in dumb.copies.items() if k[1] in dumb.instances}
    assert {(c.model_id, c.instance_id): c for c in view.all_copies()} == visible
    for m in MODELS:
        assert list(view.copies_of(m)) == [
            c for k, c in sorted(visible.items(), key=by_key) if k[0] == m
        ]
        loaded = sorted(
            i for (k, i), c in visible.items() if k == m and c.state is CopyState.LOADED
        )
        lasting = tuple(i for i in loaded if dumb.instances[i].state is READY)
        leaving = tuple(i for i in loaded if dumb.instances[i].state is InstanceState.DRAINING)
        assert view.loaded_on(m) == (lasting or leaving)
        assert view.lasting_on(m) == lasting
        assert view.pending_of(m) == tuple(sorted(i for k, i in dumb.pending if k == m))
        assert set(view.aliases_of(m)) == {
            v.name for v in dumb.vmodels.values() if m in (v.active_model_id, v.target_model_id)
        }
    for i, slot in view.instances.items():
        held = [c for (_, on), c in visible.items() if on == i]
        asked = [size for (_, on), size in dumb.pending.items() if on == i]
        used = max(dumb.instances[i].used_bytes, sum(c.size_bytes for c in held)) + sum(asked)
        assert slot.effective_free_bytes == max(0, 100 - used)
        assert slot.loads_in_progress == len(asked) + sum(c.state is LOADING for c in held)
    named = {m for v in dumb.vmodels.values() for m in (v.active_model_id, v.target_model_id)}
    auto = {m for m, record in dumb.models.items() if record.auto_delete}
    assert set(view.unaliased_models()) == auto - named
    assert set(view.models_with_minimum()) == {
        m for m, record in dumb.models.items() if record.pinned or record.min_copies > 1
    }
    assert set(view.vmodels_in_transition()) == {
        v.name for v in dumb.vmodels.values() if v.active_model_id != v.target_model_id
    }
