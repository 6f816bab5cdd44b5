"""Two routers on one port cause one load of a model, and tell the same tale."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

from tests.e2e.asking import Asker, instances_of, isvc, raw_request, routers_of, total
from tests.e2e.conftest import Shared

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

CONNECTIONS = 12
MODELS = 8


@pytest.fixture
def askers(shared: Shared) -> Iterator[list[Asker]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Asker(shared.grpc)) for _ in range(CONNECTIONS)]


def test_two_routers_cause_one_load(shared: Shared, askers: list[Asker]) -> None:
    routers, instances = routers_of(shared.mesh), instances_of(shared.mesh)
    uri = (shared.models / "digits-0001").as_uri()
    names = [f"twice-{number}" for number in range(MODELS)]
    for name in names:
        askers[0].apply(isvc(name, uri))
    missed = [total([router], "mesh_misses_total") for router in routers]
    for name in names:
        loads = total(instances, "mesh_loads_total", outcome="loaded")
        request = raw_request(name, input=np.ones((1, 64), np.float32))
        answers = [asker.infer_later(request) for asker in askers]
        assert all(answer.result() for answer in answers)
        assert total(instances, "mesh_loads_total", outcome="loaded") == loads + 1
        assert askers[0].rows()[name]["copies_loaded"] == 1
    for router, before in zip(routers, missed, strict=True):
        assert total([router], "mesh_misses_total") > before, "both routers had to do with it"
    for name in names:
        assert askers[-1].delete(name)


def test_what_one_router_was_told_the_other_knows_at_once(
    shared: Shared, askers: list[Asker]
) -> None:
    uri = (shared.models / "iris-0001").as_uri()
    for number, asker in enumerate(askers):
        name = f"told-{number}"
        asker.apply(isvc(name, uri))
        other = askers[number - 1]
        assert other.labels(name) == [0, 2]
        assert other.delete(name)
        assert other.refused(raw_request(name, input=np.ones((1, 4), np.float32)))
