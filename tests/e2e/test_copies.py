"""Copies that a resource asks for, sizes that are remembered, and how many requests run at once."""

from __future__ import annotations

import numpy as np
import pytest

from tests.e2e.asking import Asker, eventually, instances_of, isvc, raw_request, total
from tests.e2e.conftest import Shared
from tests.e2e.models import rounds, slow

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_two_replicas_are_two_copies_without_any_request(shared: Shared, ask: Asker) -> None:
    manifest = isvc("on-both", (shared.models / "iris-0001").as_uri())
    manifest["spec"]["predictor"]["minReplicas"] = 2
    ask.apply(manifest, load_now=True)
    eventually(lambda: ask.rows()["on-both"]["copies_loaded"] == 2, "a copy on each")
    assert len(set(ask.rows()["on-both"]["instance_ids"])) == 2
    assert ask.delete("on-both")


def test_a_pinned_model_is_loaded_and_outlives_a_storm(shared: Shared, ask: Asker) -> None:
    uri = (shared.models / "digits-0001").as_uri()
    ask.apply(isvc("pinned", uri, annotations={"mesh.serving/pin": "true"}))
    eventually(lambda: ask.rows()["pinned"]["copies_loaded"] == 1, "the pinned copy")
    before = total(instances_of(shared.mesh), "mesh_evictions_total")
    for number in range(12):
        ask.apply(isvc(f"pushing-{number}", uri))
        ask.infer(raw_request(f"pushing-{number}", input=np.ones((1, 64), np.float32)))
    assert total(instances_of(shared.mesh), "mesh_evictions_total") > before
    assert ask.rows()["pinned"]["copies_loaded"] == 1
    for name in ("pinned", *(f"pushing-{number}" for number in range(12))):
        assert ask.delete(name)


def test_a_measured_size_is_kept_for_the_next_load(shared: Shared, ask: Asker) -> None:
    ask.apply(isvc("measured", (shared.models / "digits-0002").as_uri()))
    assert ask.describe("measured")["active"]["size_bytes_measured"] is None
    ask.infer(raw_request("measured", input=np.ones((1, 64), np.float32)))
    file_bytes = (shared.models / "digits-0002" / "model.onnx").stat().st_size

    def written() -> bool:
        return (ask.describe("measured")["active"]["size_bytes_measured"] or 0) > file_bytes

    eventually(written, "the size in the record")
    assert ask.delete("measured")


def test_a_model_runs_no_more_requests_at_once_than_it_allows(shared: Shared, ask: Asker) -> None:
    slow(shared.root / "one-by-one" / "model.onnx")
    limit = {"mesh.serving/max-concurrency": "1"}
    ask.apply(isvc("one-by-one", (shared.root / "one-by-one").as_uri(), annotations=limit))
    ask.infer(rounds("one-by-one", 1))
    running = [ask.infer_later(rounds("one-by-one", 8_000)) for _ in range(3)]
    eventually(lambda: total(instances_of(shared.mesh), "mesh_queued_requests") >= 1, "a queue")
    assert all(one.result(timeout=60) for one in running)
    assert ask.delete("one-by-one")
