"""Recording: what is counted where, and what bounds the labels."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.metric_series import MS_BUCKETS
from mesh.metrics import (
    MAX_FAST_KEYS,
    MAX_LABEL_SETS,
    OTHER,
    Histogram,
    InstanceMetrics,
    RouterMetrics,
)

INFER = "/inference.GRPCInferenceService/ModelInfer"


@given(st.lists(st.floats(min_value=0, max_value=1e7)))
def test_a_histogram_counts_each_value_once_in_the_first_bucket_that_holds_it(
    values: list[float],
) -> None:
    histogram = Histogram(MS_BUCKETS)
    for value in values:
        histogram.observe(value)
    cumulative = histogram.cumulative()
    for bound, seen in cumulative[:-1]:
        assert seen == sum(value <= float(bound) for value in values)
    assert cumulative[-1] == ("+Inf", len(values))
    assert histogram.count == len(values)
    assert histogram.total == pytest.approx(sum(values))


def test_a_value_on_a_bound_belongs_to_that_bound() -> None:
    histogram = Histogram(MS_BUCKETS)
    histogram.observe(5.0)
    assert histogram.counts[bisect_left(MS_BUCKETS, 5.0)] == 1
    assert dict(histogram.cumulative())["5.0"] == 1
    assert dict(histogram.cumulative())["2.0"] == 0


def test_path_and_short_name_are_one_series() -> None:
    metrics = RouterMetrics()
    metrics.request_done(INFER, 0, 1, 1, 1)
    metrics.request_done("ModelInfer", 0, 1, 1, 1)
    assert metrics.value("api_request", "ModelInfer", "OK") == 2
    assert metrics.value("request_size", "ModelInfer", "OK") == 2
    assert metrics.value("response_size", "ModelInfer", "OK") == 2


def test_methods_that_a_client_invents_share_one_label() -> None:
    metrics = RouterMetrics()
    for number in range(10_000):
        metrics.request_done(f"/evil.Service{number}/Method{number}", 12, 1, 1, 1)
    assert metrics.value("api_request", OTHER, "UNIMPLEMENTED") == 10_000
    assert metrics.render()[0].count(b"modelmesh_api_request_milliseconds_count") == 1


def test_prefixes_that_a_client_invents_do_not_fill_the_memory() -> None:
    metrics = RouterMetrics()
    for number in range(MAX_FAST_KEYS + 100):
        metrics.request_done(f"/evil{number}/ModelInfer", 0, 1, 1, 1)
    assert len(metrics._request_cells) <= MAX_FAST_KEYS
    assert metrics.value("api_request", "ModelInfer", "OK") == MAX_FAST_KEYS + 100


def test_a_method_that_the_operator_names_has_its_own_label() -> None:
    metrics = RouterMetrics(methods=["/tensorflow.serving.PredictionService/Predict"])
    metrics.request_done("/tensorflow.serving.PredictionService/Predict", 0, 1, 1, 1)
    assert metrics.value("api_request", "Predict", "OK") == 1


def test_a_code_that_grpc_does_not_know_is_unknown() -> None:
    metrics = InstanceMetrics()
    metrics.invoke_done(INFER, 99, 1)
    metrics.invoke_done(INFER, -1, 1)
    assert metrics.value("invoke_model", "ModelInfer", "UNKNOWN") == 2


def test_reasons_are_capped() -> None:
    metrics = RouterMetrics()
    for number in range(MAX_LABEL_SETS + 50):
        metrics.counter("placements", f"reason {number}")
    assert metrics.value("placements", OTHER) == 50
    assert len(metrics._counters["placements"]) == MAX_LABEL_SETS + 1


def test_per_model_labels_are_off_unless_asked_for() -> None:
    metrics = RouterMetrics()
    metrics.request_done(INFER, 0, 1, 1, 1, "m", "v")
    metrics.observe("cache_miss", 1, "m", "v")
    assert b"modelId" not in metrics.render()[0]


def test_per_model_labels_follow_modelmesh_names_and_are_bounded() -> None:
    metrics = RouterMetrics(per_model=True, max_models=2)
    for number in range(5):
        metrics.request_done(INFER, 0, 1, 1, 1, f"m{number}", "v")
        metrics.observe("cache_miss", 1, f"m{number}", "v")
    assert metrics.value("api_request", "ModelInfer", "OK", "m1", "v") == 1
    assert metrics.value("api_request", "ModelInfer", "OK", OTHER, OTHER) == 3
    assert metrics.value("cache_miss", OTHER, OTHER) == 3
    text = metrics.render()[0].decode()
    assert 'code="OK",method="ModelInfer",modelId="m0",vModelId="v"' in text


def test_label_values_are_escaped() -> None:
    metrics = RouterMetrics(per_model=True)
    metrics.request_done(INFER, 0, 1, 1, 1, 'a"\\\nb')
    assert r'modelId="a\"\\\nb"' in metrics.render()[0].decode()


def test_a_gauge_source_is_asked_at_each_scrape_and_none_hides_it() -> None:
    metrics = RouterMetrics()
    seen: list[float | None] = [3, None]
    metrics.gauge_source("inflight", lambda: seen[0])
    assert b"mesh_inflight_requests 3.0" in metrics.render()[0]
    seen[0] = None
    assert b"mesh_inflight_requests" not in metrics.render()[0]


def test_a_leader_that_is_one_no_more_takes_its_gauges_off_the_page() -> None:
    metrics = RouterMetrics()
    metrics.gauge("models_managed", 12)
    assert b"modelmesh_models_managed_total 12.0" in metrics.render()[0]
    metrics.gauge("models_managed", None)
    assert b"modelmesh_models_managed_total" not in metrics.render()[0]


def test_used_basis_points_follow_from_used_and_capacity() -> None:
    metrics = InstanceMetrics()
    assert b"used_bps" not in metrics.render()[0]
    metrics.gauge_source("capacity_bytes", lambda: 1_000)
    metrics.gauge("used_bytes", 125)
    assert b"modelmesh_instance_used_bps 1250.0" in metrics.render()[0]
    metrics.gauge_source("capacity_bytes", lambda: 0)
    assert b"used_bps" not in metrics.render()[0]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (lambda m: m.counter("hitz"), "no counter 'hitz' in a router; declared: hits, misses"),
        (lambda m: m.counter("evictions", "x"), "no counter 'evictions' in a router"),
        (lambda m: m.observe("inflight", 1), "no histogram 'inflight'"),
        (lambda m: m.gauge("hits", 1), "no gauge 'hits'"),
        (lambda m: m.gauge_source("nope", float), "no gauge 'nope'"),
        (lambda m: m.counter("retries"), r"counter 'retries' has the labels \('failure',\)"),
        (lambda m: m.counter("hits", "x"), "counter 'hits' has the labels"),
        (lambda m: m.observe("api_request", 1), "has the labels"),
        (lambda m: m.add("hits", -1), "cannot go down"),
    ],
)
def test_what_is_not_declared_is_refused_and_says_what_is(record, says) -> None:
    with pytest.raises((KeyError, ValueError), match=says):
        record(RouterMetrics())


def test_add_counts_by_an_amount() -> None:
    metrics = InstanceMetrics()
    metrics.add("loads", 3, "onnx", "LOADED")
    metrics.add("loads", 2, "onnx", "LOADED")
    assert metrics.value("loads", "onnx", "LOADED") == 5
