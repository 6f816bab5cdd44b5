"""What stands on the page: names, kinds, labels, buckets, as a stranger's parser reads them."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mesh.metric_series import exposed_names
from mesh.metrics import InstanceMetrics, RouterMetrics

MS = ("0.5", "1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "75.0", "100.0", "200.0", "500.0",
      "1000.0", "2000.0", "5000.0", "10000.0", "20000.0", "60000.0", "120000.0", "300000.0",
      "+Inf")  # fmt: skip
AGE = ("30000.0", "300000.0", "900000.0", "3600000.0", "14400000.0", "43200000.0", "86400000.0",
       "604800000.0", "2592000000.0", "7776000000.0", "+Inf")  # fmt: skip
MESSAGE = ("128.0", "512.0", "2048.0", "8192.0", "32768.0", "131072.0", "524288.0", "2097152.0",
           "+Inf")  # fmt: skip
MODEL = ("262144.0", "1048576.0", "4194304.0", "16777216.0", "67108864.0", "268435456.0",
         "1073741824.0", "4294967296.0", "+Inf")  # fmt: skip
ROWS = ("1.0", "2.0", "4.0", "8.0", "16.0", "32.0", "64.0", "128.0", "256.0", "512.0", "+Inf")

# (name, labels, bucket bounds): ModelMesh's histograms as its users query them.
ROUTER_HISTOGRAMS = [
    ("modelmesh_api_request_milliseconds", ("method", "code"), MS),
    ("modelmesh_request_size_bytes", ("method", "code"), MESSAGE),
    ("modelmesh_response_size_bytes", ("method", "code"), MESSAGE),
    ("modelmesh_cache_miss_milliseconds", (), MS),
]
INSTANCE_HISTOGRAMS = [
    ("modelmesh_invoke_model_milliseconds", ("method", "code"), MS),
    ("modelmesh_cache_miss_milliseconds", (), MS),
    ("modelmesh_loadmodel_milliseconds", (), MS),
    ("modelmesh_unloadmodel_milliseconds", (), MS),
    ("modelmesh_req_queue_delay_milliseconds", (), MS),
    ("modelmesh_loading_queue_delay_milliseconds", (), MS),
    ("modelmesh_model_sizing_milliseconds", (), MS),
    ("modelmesh_loaded_model_size_bytes", (), MODEL),
    ("modelmesh_age_at_eviction_milliseconds", (), AGE),
    ("mesh_batch_size", (), ROWS),
]
ROUTER_GAUGES = [
    "modelmesh_models_loaded_total",
    "modelmesh_models_with_failure_total",
    "modelmesh_models_managed_total",
    "mesh_waiting_requests",
    "mesh_retry_budget",
    "mesh_ejected_instances",
    "mesh_shortfall_copies",
    "mesh_route_table_models",
    "mesh_route_table_copies",
    "mesh_instances",
    "mesh_view_revision",
    "mesh_leader",
    "mesh_buffered_bytes",
    "mesh_inflight_requests",
    "mesh_connections",
    "mesh_store_connected",
]
INSTANCE_GAUGES = [
    "modelmesh_instance_lru_seconds",
    "modelmesh_instance_lru_age_seconds",
    "modelmesh_instance_capacity_bytes",
    "modelmesh_instance_used_bytes",
    "modelmesh_instance_used_bps",
    "modelmesh_instance_models_total",
    "mesh_loading_models",
    "mesh_queued_requests",
    "mesh_inflight_requests",
    "mesh_connections",
    "mesh_store_connected",
]
# (name, labels): counters of ours end in _total, ModelMesh's stand bare.
ROUTER_COUNTERS = [
    ("mesh_hits_total", ()),
    ("mesh_misses_total", ()),
    ("mesh_retries_total", ("failure",)),
    ("mesh_placements_total", ("reason",)),
    ("mesh_errors_total", ("reason",)),
    ("mesh_loads_requested_total", ("outcome",)),
    ("mesh_retries_refused_total", ()),
    ("mesh_decisions_total", ("kind", "reason")),
]
INSTANCE_COUNTERS = [
    ("modelmesh_loadmodel_failure", ()),
    ("modelmesh_unloadmodel_failure", ()),
    ("modelmesh_unloadmodel_attempt_failure", ()),
    ("mesh_loads_total", ("model_type", "outcome")),
    ("mesh_evictions_total", ("reason",)),
    ("mesh_decisions_total", ("kind", "reason")),
]
PROCESS = ["process_resident_memory_bytes", "process_cpu_seconds_total"]

Samples = dict[str, list[tuple[dict[str, str], float]]]


def samples(metrics: RouterMetrics | InstanceMetrics) -> Samples:
    """Every sample of a page by name, read by prometheus_client's own parser."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    text = body.decode()
    written = {re.split("[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    out: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # The parser gives every counter the OpenMetrics suffix: what counts is what is written.
            bare = sample.name.removesuffix("_total")
            name = sample.name if sample.name in written else bare
            assert name in written
            out.setdefault(name, []).append((dict(sample.labels), sample.value))
    return out


def filled_router() -> RouterMetrics:
    metrics = RouterMetrics(version="1.2.3")
    metrics.request_done("/inference.GRPCInferenceService/ModelInfer", 0, 3.0, 400, 500)
    metrics.observe("cache_miss", 80.0)
    for key in ("models_loaded", "models_with_failure", "models_managed", "waiting",
                "retry_budget", "ejected", "shortfall",
                "route_models", "route_copies", "instances", "view_revision", "leader",
                "buffered_bytes", "inflight", "connections", "store_connected"):  # fmt: skip
        metrics.gauge(key, 7)
    metrics.counter("hits")
    metrics.counter("misses")
    metrics.counter("retries", "not-here")
    metrics.counter("placements", "most free memory")
    metrics.counter("errors", "unknown-model")
    metrics.counter("loads_requested", "LOADED")
    metrics.counter("retries_refused")
    metrics.counter("decisions", "place", "most free memory")
    return metrics


def filled_instance() -> InstanceMetrics:
    metrics = InstanceMetrics(version="1.2.3")
    metrics.invoke_done("/inference.GRPCInferenceService/ModelInfer", 3, 0.2)
    for key in ("loadmodel", "unloadmodel", "req_queue_delay", "loading_queue_delay",
                "model_sizing", "cache_miss", "loaded_model_size", "age_at_eviction",
                "batch_size"):  # fmt: skip
        metrics.observe(key, 5.0)
    for key in ("lru_seconds", "lru_age_seconds", "capacity_bytes", "used_bytes", "models_total",
                "loading", "queued", "inflight", "connections", "store_connected"):  # fmt: skip
        metrics.gauge(key, 7)
    metrics.counter("loads", "onnx", "LOADED")
    metrics.counter("decisions", "evict", "lru")
    metrics.counter("evictions", "room for another")
    for key in ("loadmodel_failure", "unloadmodel_failure", "unloadmodel_attempt_failure"):
        metrics.counter(key)
    return metrics


FILLED = {"router": filled_router, "instance": filled_instance}


@pytest.mark.parametrize(
    ("role", "name", "labels", "bounds"),
    [("router", *row) for row in ROUTER_HISTOGRAMS]
    + [("instance", *row) for row in INSTANCE_HISTOGRAMS],
)
def test_a_histogram_has_its_labels_and_buckets(
    role: str, name: str, labels: tuple[str, ...], bounds: tuple[str, ...]
) -> None:
    page = samples(FILLED[role]())
    buckets = page[name + "_bucket"]
    assert tuple(found["le"] for found, _ in buckets) == bounds
    for found, _ in buckets:
        assert set(found) == {*labels, "le"}
    assert page[name + "_count"][0][1] == 1 == buckets[-1][1]
    assert page[name + "_sum"][0][1] > 0


@pytest.mark.parametrize(
    ("role", "name"),
    [("router", name) for name in ROUTER_GAUGES] + [("instance", name) for name in INSTANCE_GAUGES],
)
def test_a_gauge_stands_alone(role: str, name: str) -> None:
    ((labels, value),) = samples(FILLED[role]())[name]
    assert labels == {}
    assert value == (10_000 if name.endswith("used_bps") else 7)


@pytest.mark.parametrize(
    ("role", "name", "labels"),
    [("router", *row) for row in ROUTER_COUNTERS]
    + [("instance", *row) for row in INSTANCE_COUNTERS],
)
def test_a_counter_has_its_name_and_labels(role: str, name: str, labels: tuple[str, ...]) -> None:
    page = samples(FILLED[role]())
    ((found, value),) = page[name]
    assert (tuple(found), value) == (labels, 1)


@pytest.mark.parametrize("role", ["router", "instance"])
def test_nothing_stands_on_the_page_that_the_tables_do_not_name(role: str) -> None:
    histograms, gauges, counters = {
        "router": (ROUTER_HISTOGRAMS, ROUTER_GAUGES, ROUTER_COUNTERS),
        "instance": (INSTANCE_HISTOGRAMS, INSTANCE_GAUGES, INSTANCE_COUNTERS),
    }[role]
    expected = {name + end for name, _, _ in histograms for end in ("_bucket", "_sum", "_count")}
    expected |= {*gauges, *(name for name, _ in counters), "mesh_build_info"}
    found = {name for name in samples(FILLED[role]()) if not name.startswith("process_")}
    assert found == expected
    assert found < exposed_names()


@pytest.mark.parametrize("role", ["router", "instance"])
def test_the_process_tells_its_memory_and_cpu(role: str) -> None:
    page = samples(FILLED[role]())
    for name in PROCESS:
        ((_, value),) = page[name]
        assert value > 0
    assert {name for name in page if name.startswith("process_")} <= exposed_names()


def test_a_counter_of_modelmesh_is_declared_bare_as_a_counter() -> None:
    text = filled_instance().render()[0].decode()
    assert "# TYPE modelmesh_loadmodel_failure counter\n" in text
    assert "# HELP modelmesh_loadmodel_failure Loads that failed\n" in text
    assert "\nmodelmesh_loadmodel_failure 1.0\n" in text
    assert "modelmesh_loadmodel_failure_total" not in text


def test_no_series_is_declared_twice_on_a_page() -> None:
    for filled in FILLED.values():
        text = filled().render()[0].decode()
        declared = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(declared) == len(set(declared))


def test_build_info_tells_version_and_role() -> None:
    ((labels, value),) = samples(filled_router())["mesh_build_info"]
    assert (labels, value) == ({"version": "1.2.3", "role": "router"}, 1)


def test_series_without_labels_stand_at_zero_before_anything_happens() -> None:
    page = samples(InstanceMetrics())
    assert page["modelmesh_loadmodel_failure"] == [({}, 0)]
    assert page["modelmesh_loadmodel_milliseconds_count"] == [({}, 0)]
