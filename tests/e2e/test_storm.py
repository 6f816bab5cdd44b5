"""Many more models than memory, all asked at once: every request is answered, no byte too many."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.e2e.asking import Asker, instances_of, isvc, raw_request, scrape, total
from tests.e2e.conftest import Shared

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

MODELS = 40  # some 15 MB; the two instances hold 3 MiB
THREADS = 8
REQUESTS_EACH = 40
SEED = 7


@pytest.fixture
def many(shared: Shared, ask: Asker) -> Iterator[list[str]]:
    kinds = ["digits-0001", "digits-0002", "digits-0003", "digits-0004"]
    names = [f"storm-{number:02d}" for number in range(MODELS)]
    for number, name in enumerate(names):
        ask.apply(isvc(name, (shared.models / kinds[number % 4]).as_uri()))
    yield names
    for name in names:
        ask.delete(name)


def test_no_request_fails_and_memory_is_kept(shared: Shared, many: list[str]) -> None:
    failures: list[str] = []
    evicted = total(instances_of(shared.mesh), "mesh_evictions_total")

    def client(seed: int) -> None:
        draw = random.Random(seed)
        with Asker(shared.grpc) as ask:
            for _ in range(REQUESTS_EACH):
                name = many[min(int(draw.paretovariate(0.6)) - 1, MODELS - 1)]
                request = raw_request(name, input=np.ones((1, 64), np.float32))
                try:
                    assert ask.infer(request, timeout_s=60).model_name == name
                except Exception as error:
                    failures.append(f"{name}: {error}")

    clients = [threading.Thread(target=client, args=(SEED + at,)) for at in range(THREADS)]
    for one in clients:
        one.start()
    looks = 0
    while any(one.is_alive() for one in clients):
        for address in instances_of(shared.mesh):
            page = scrape(address)
            [(_, used)] = page["modelmesh_instance_used_bytes"]
            assert used <= 1536 << 10, "more memory than the operator gave"
            looks += 1
        clients[0].join(0.02)
    assert not failures, failures[:3]
    assert looks > 10
    assert total(instances_of(shared.mesh), "mesh_evictions_total") > evicted, "no storm at all"
