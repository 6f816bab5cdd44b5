"""How many pods, as a table; and plans that lead to what is desired and then ask for nothing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.reconciler.config import ControllerConfig
from mesh.reconciler.kube_resources import AUTOSCALERS, DEPLOYMENTS, SERVICES, Obj
from mesh.reconciler.plan_runtime import (
    IDLE_MIN_MS,
    Apply,
    Remove,
    Replicas,
    RuntimeUsage,
    Scale,
    WorkloadAction,
    decide_replicas,
    idle_after_ms,
    idle_warning,
    plan_workloads,
)
from mesh.reconciler.workload import RuntimeSource, runtime_objects
from mesh.reconciler.workload_router import router_objects
from tests.reconciler.test_workload import source

CONFIG = ControllerConfig()  # two pods; a minute of grace
NOW = 10_000_000
IDLE = source(annotations={"mesh.serving/scale-to-zero-after": "20m"})
SCALED = source(
    annotations={
        "serving.kserve.io/autoscalerClass": "hpa",
        "serving.kserve.io/min-scale": "2",
        "serving.kserve.io/max-scale": "6",
    }
)
USED = RuntimeUsage(models=1)
MINUTE = 60_000


def since(ms: int) -> RuntimeUsage:
    return RuntimeUsage(unused_since_ms=NOW - ms)


@pytest.mark.parametrize(
    ("of", "usage", "current", "decided"),
    [
        # As many as are asked for.
        (source(), USED, 2, Replicas(2, "podsPerRuntime")),
        (source(), USED, 0, Replicas(2, "podsPerRuntime")),
        (source(), USED, None, Replicas(2, "podsPerRuntime")),
        (source(replicas=5), USED, 2, Replicas(5, "spec.replicas")),
        (source(replicas=0), USED, 2, Replicas(0, "spec.replicas")),
        # Nobody uses it: at once where there is nothing yet, else after the grace.
        (source(), since(0), None, Replicas(0, "unused")),
        (source(), since(0), 0, Replicas(0, "unused")),
        (source(), since(0), 2, Replicas(2, "unused-lately", NOW + MINUTE)),
        (source(), since(MINUTE - 1), 2, Replicas(2, "unused-lately", NOW + 1)),
        (source(), since(MINUTE), 2, Replicas(0, "unused")),
        (source(), RuntimeUsage(), 2, Replicas(2, "unused-lately", NOW + MINUTE)),
        # A model selects it, but nobody asks for one.
        (IDLE, replace(USED, last_used_at_ms=NOW - 20 * MINUTE), 2, Replicas(0, "idle")),
        (
            IDLE,
            replace(USED, last_used_at_ms=NOW - 5 * MINUTE),
            2,
            Replicas(2, "used-lately", NOW + 15 * MINUTE),
        ),
        (IDLE, replace(USED, loading=1), 0, Replicas(2, "loading")),
        (IDLE, USED, 0, Replicas(0, "idle")),
        (
            IDLE,
            replace(USED, demanded_at_ms=NOW - MINUTE),
            0,
            Replicas(2, "used-lately", NOW + 19 * MINUTE),
        ),
        (IDLE, since(MINUTE), 2, Replicas(0, "unused")),
        # Between its bounds the autoscaler decides.
        (SCALED, USED, None, Replicas(2, "autoscaler")),
        (SCALED, USED, 0, Replicas(2, "autoscaler")),
        (SCALED, USED, 4, Replicas(4, "autoscaler")),
        (SCALED, USED, 9, Replicas(6, "autoscaler")),
        (SCALED, since(MINUTE), 4, Replicas(0, "unused")),
        (SCALED, since(0), 4, Replicas(4, "unused-lately", NOW + MINUTE)),
    ],
)
def test_how_many(
    of: RuntimeSource, usage: RuntimeUsage, current: int | None, decided: Replicas
) -> None:
    assert decide_replicas(of, usage, NOW, CONFIG, current) == decided


@pytest.mark.parametrize("of", [source(), IDLE, SCALED])
def test_nothing_goes_to_zero_where_that_is_off(of: RuntimeSource) -> None:
    config = replace(CONFIG, scale_to_zero=False)
    assert decide_replicas(of, since(10 * MINUTE), NOW, config, None).count == 2


@given(
    models=st.integers(0, 2),
    used_ms=st.integers(0, 2 * NOW),
    demanded_ms=st.integers(0, 2 * NOW),
    loading=st.integers(0, 2),
    unused_ms=st.one_of(st.none(), st.integers(0, 2 * NOW)),
    current=st.one_of(st.none(), st.integers(0, 8)),
    of=st.sampled_from([source(), IDLE, SCALED, source(replicas=3)]),
)
def test_a_decision_holds_until_it_says(
    models: int,
    used_ms: int,
    demanded_ms: int,
    loading: int,
    unused_ms: int | None,
    current: int | None,
    of: RuntimeSource,
) -> None:
    usage = RuntimeUsage(models, used_ms, loading, demanded_ms, unused_ms)
    decided = decide_replicas(of, usage, NOW, CONFIG, current)
    again_ms = decided.look_again_ms
    assert again_ms is None or again_ms > NOW
    if usage.unused_since_ms is None and models == 0:
        return  # not known since when: counted from now on, and the caller is to remember
    later_ms = NOW + 10**9 if again_ms is None else again_ms - 1
    then = decide_replicas(of, usage, later_ms, CONFIG, decided.count)
    assert then.count == decided.count
    if again_ms is not None:
        assert decide_replicas(of, usage, again_ms, CONFIG, decided.count).count == 0


@pytest.mark.parametrize(
    ("text", "idle_ms", "said"),
    [
        ("20m", 20 * MINUTE, ""),
        ("1h30m", 90 * MINUTE, ""),
        ("5s", IDLE_MIN_MS, "short of the least"),
        ("soon", None, "expected a duration"),
    ],
)
def test_the_annotation(text: str, idle_ms: int | None, said: str) -> None:
    of = source(annotations={"mesh.serving/scale-to-zero-after": text})
    assert idle_after_ms(of) == idle_ms
    assert said in idle_warning(of)
    assert bool(said) == bool(idle_warning(of))


class Cluster:
    """Objects as an API server keeps them; what it does with the actions of a plan."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Obj] = {}
        self._uids = itertools.count()

    def do(self, action: WorkloadAction) -> None:
        match action:
            case Apply(_, obj):
                key = obj["kind"], obj["metadata"]["name"]
                uid = self.objects.get(key, {"metadata": {}})["metadata"].get("uid")
                self.objects[key] = copy.deepcopy(obj)
                self.objects[key]["metadata"]["uid"] = uid or f"uid-{next(self._uids)}"
            case Scale(_, name, replicas):
                self.objects["Deployment", name]["spec"]["replicas"] = replicas
            case Remove(resource, _, name, uid):
                assert self.objects.pop((resource.kind, name))["metadata"]["uid"] == uid

    def settle(self, desired: Iterable[Obj]) -> None:
        desired = list(desired)
        for _ in range(3):
            plan = plan_workloads(desired, self.objects.values())
            for action in plan:
                self.do(action)
            if not plan:
                return
        raise AssertionError("still something to do")


def wanted(
    *sources: RuntimeSource, config: ControllerConfig = CONFIG, replicas: int = 2
) -> list[Obj]:
    made = list(router_objects(config, namespace="n"))
    for one in sources:
        made += runtime_objects(one, config, namespace="n", replicas=replicas)
    return made


def test_what_is_not_there_is_made_in_order() -> None:
    plan = plan_workloads(wanted(SCALED), [])
    kinds = [one.object["kind"] for one in plan if isinstance(one, Apply)]
    assert len(kinds) == len(plan) == 8
    assert kinds.index("ConfigMap") < kinds.index("Deployment")
    assert kinds[-1] == "HorizontalPodAutoscaler"


def test_at_rest_there_is_nothing_to_do() -> None:
    cluster = Cluster()
    cluster.settle(wanted(source("a"), source("b")))
    assert plan_workloads(wanted(source("a"), source("b")), cluster.objects.values()) == ()


def test_another_number_is_a_scale_and_nothing_else() -> None:
    cluster = Cluster()
    cluster.settle(wanted(source("a")))
    plan = plan_workloads(wanted(source("a"), replicas=0), cluster.objects.values())
    assert plan == (Scale("n", "modelmesh-serving-a", 0),)


def test_a_runtime_that_goes_takes_all_with_it() -> None:
    cluster = Cluster()
    cluster.settle(wanted(source("a"), SCALED))
    plan = plan_workloads(wanted(source("a")), cluster.objects.values())
    assert [one.resource for one in plan if isinstance(one, Remove)][:2] == [
        AUTOSCALERS,
        DEPLOYMENTS,
    ]
    cluster.settle(wanted(source("a")))
    assert not [name for _, name in cluster.objects if name.startswith("modelmesh-serving-onnx")]


def test_without_the_annotation_the_autoscaler_goes() -> None:
    cluster = Cluster()
    cluster.settle(wanted(SCALED))
    plan = plan_workloads(wanted(source()), cluster.objects.values())
    assert [one.resource for one in plan if isinstance(one, Remove)] == [AUTOSCALERS]


def test_what_is_being_deleted_already_is_left_alone() -> None:
    cluster = Cluster()
    cluster.settle(wanted(source("a")))
    for one in cluster.objects.values():
        one["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert plan_workloads([], cluster.objects.values()) == ()


def test_a_service_that_is_headless_no_more_is_made_anew() -> None:
    """clusterIP cannot be changed."""
    cluster = Cluster()
    cluster.settle(wanted())
    config = replace(CONFIG, headless=False)
    plan = plan_workloads(wanted(config=config), cluster.objects.values())
    assert [(type(one), one.resource) for one in plan if not isinstance(one, Scale)] == [
        (Remove, SERVICES)
    ]
    cluster.settle(wanted(config=config))
    assert "clusterIP" not in cluster.objects["Service", "modelmesh-serving"]["spec"]


def test_another_name_of_the_service_moves_everything() -> None:
    cluster = Cluster()
    cluster.settle(wanted(source("a")))
    config = replace(CONFIG, service_name="other")
    cluster.settle(wanted(source("a"), config=config))
    assert {name for _, name in cluster.objects} == {"other", "other-a"}


def changes() -> list[tuple[list[Obj], list[Obj]]]:
    more = source("a", nodeSelector={"disk": "fast"})
    return [
        ([], wanted(source("a"), SCALED)),
        (wanted(source("a"), SCALED), wanted(source("a"), replicas=0)),
        (wanted(source("a")), wanted(more)),
        (wanted(source("a"), SCALED), []),
        (wanted(), wanted(config=replace(CONFIG, headless=False))),
    ]


@pytest.mark.parametrize("change", range(len(changes())))
def test_cut_anywhere_the_next_plan_leads_to_the_same(change: int) -> None:
    before, after = changes()[change]
    whole = Cluster()
    whole.settle(before)
    steps = plan_workloads(after, whole.objects.values())
    whole.settle(after)
    for cut in range(len(steps) + 1):
        cluster = Cluster()
        cluster.settle(before)
        for action in steps[:cut]:
            cluster.do(action)
        cluster.settle(after)
        assert _without_uids(cluster) == _without_uids(whole)


def _without_uids(cluster: Cluster) -> dict[tuple[str, str], Any]:
    found = copy.deepcopy(cluster.objects)
    for one in found.values():
        del one["metadata"]["uid"]
    return found
