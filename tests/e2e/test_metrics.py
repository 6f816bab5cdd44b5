"""What Prometheus scrapes: every process answers, ModelMesh's names stand there after traffic."""

from __future__ import annotations

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mesh.metric_series import SERIES, Role
from protos import oip_pb2 as oip
from tests.e2e.asking import (
    OIP,
    Asker,
    flowers,
    http_ask,
    instances_of,
    routers_of,
    scrape,
    total,
)
from tests.e2e.conftest import Shared

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_the_file_sd_list_names_every_process(shared: Shared) -> None:
    entries = json.loads((shared.mesh.data_dir / "prometheus_sd.json").read_text())
    listed = [address for entry in entries for address in entry["targets"]]
    assert listed == [*routers_of(shared.mesh), *instances_of(shared.mesh)]
    for address in listed:
        status, headers, body = http_ask(address, "GET", "/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain")
        families = list(text_string_to_metric_families(body.decode()))
        assert len(families) > 15
        assert http_ask(address, "GET", "/readyz")[0] == 200


def test_modelmeshs_series_stand_there_after_traffic(shared: Shared, ask: Asker) -> None:
    for name in ("iris-0001", "wine-0001", "digits-0001", "digits-0002"):
        load = oip.RepositoryModelLoadRequest(model_name=name)
        ask.call(OIP + "RepositoryModelLoad", load, oip.RepositoryModelLoadResponse)
    ask.labels("iris-0001")
    for role, addresses in (
        (Role.ROUTER, routers_of(shared.mesh)),
        (Role.INSTANCE, instances_of(shared.mesh)),
    ):
        seen = {name for address in addresses for name in scrape(address)}
        for series in SERIES:
            if role not in series.roles or not series.name.startswith("modelmesh_"):
                continue
            suffix = "_count" if series.kind.value == "histogram" else ""
            assert series.name + suffix in seen, (role, series.name)


def test_requests_are_counted_by_method_and_code(shared: Shared, ask: Asker) -> None:
    routers = routers_of(shared.mesh)
    name = "modelmesh_api_request_milliseconds_count"
    before = total(routers, name, method="ModelInfer", code="OK")
    missing = total(routers, name, method="ModelInfer", code="NOT_FOUND")
    for _ in range(5):
        ask.labels("iris-0001")
    ask.refused(flowers("no-such-model"))
    assert total(routers, name, method="ModelInfer", code="OK") == before + 5
    assert total(routers, name, method="ModelInfer", code="NOT_FOUND") == missing + 1


def test_one_router_leads(shared: Shared) -> None:
    assert total(routers_of(shared.mesh), "mesh_leader") == 1
    assert total(routers_of(shared.mesh), "modelmesh_models_managed_total") >= 14
