"""Records a process's metrics and writes its /metrics page; the only importer of prometheus_client.

What there is stands in ``mesh.metric_series``; a series that is not there cannot be recorded
(KeyError that names what there is).

The hit path records into plain ints and lists: no lock, no prometheus_client object. One thread
(the event loop) records; ``render`` runs in the same thread and turns the cells into families.

What bounds it: label values come from the client only as method names (unknown ones become
``other``) and, where per-model labels are switched on, as model names (``max_models`` pairs, then
``other``); any other label is capped at ``MAX_LABEL_SETS`` combinations a series. Recording never
fails for a label's value; it fails for a name or a number of labels that is not declared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mesh.core.errors import Code
from mesh.metric_series import BUILD, SERIES, Kind, Role, Series

OTHER: Final = "other"

# The text format that every Prometheus reads.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Label combinations of one series beyond which everything else is counted as ``other``: reasons,
# outcomes and model types are short closed lists, so that reaching this is a defect elsewhere.
MAX_LABEL_SETS: Final = 256

# Request label sets that are found by one look-up; a client can invent prefixes of known method
# names, so that this is bounded. What does not fit is resolved again at each request.
MAX_FAST_KEYS: Final = 4_096

# Short names of the methods that have a ``method`` label of their own.
KNOWN_METHODS: Final = frozenset(
    {
        "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer",
        "ModelStreamInfer", "ModelConfig", "ModelStatistics", "RepositoryIndex",
        "RepositoryModelLoad", "RepositoryModelUnload",
        "registerModel", "unregisterModel", "getModelStatus", "ensureLoaded", "setVModel",
        "deleteVModel", "getVModelStatus",
        "Check", "Watch", "ServerReflectionInfo",
        "Load", "Unload", "Describe", "Rest", "predict",
    }
)  # fmt: skip


class Histogram:
    """Fixed buckets, no lock, one thread. ``observe`` is a bisect and two additions."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus's buckets: (upper bound as text, observations up to it), ``+Inf`` last."""
        texts = [repr(float(bound)) for bound in self.bounds]
        return list(zip([*texts, "+Inf"], accumulate(self.counts), strict=True))


_Labels = tuple[str, ...]


class _Recorder(Collector):
    """The cells of one process. Subclasses give the names that their process records."""

    role: Role
    request_histograms: tuple[str, ...] = ()  # keys of those with ``method`` and ``code``

    def __init__(
        self,
        *,
        version: str = "",
        per_model: bool = False,
        max_models: int = 1_000,
        methods: Iterable[str] = (),
    ) -> None:
        """``methods``: further paths that get a ``method`` label (their short name) of their own.
        ``per_model``: ``modelId`` and ``vModelId`` on the histograms, ``max_models`` pairs of them.
        ``version``: the software's, for ``mesh_build_info``."""
        self._version = version
        self._per_model = per_model
        self._max_models = max_models
        self._known_methods = KNOWN_METHODS | {_short(name) for name in methods}
        self._models: set[tuple[str, str]] = set()
        self._request_cells: dict[tuple[str | int, ...], tuple[Histogram, ...]] = {}
        mine = [series for series in SERIES if self.role in series.roles]
        self._series = {series.key: series for series in mine}
        self._counters: dict[str, dict[_Labels, float]] = {}
        self._gauges: dict[str, float | Callable[[], float | None]] = {}
        self._histograms: dict[str, dict[_Labels, Histogram]] = {}
        for series in mine:
            if series.kind is Kind.COUNTER:
                # A counter without labels is there from the start, or its first increase is lost.
                self._counters[series.key] = {} if series.labels else {(): 0}
            elif series.kind is Kind.HISTOGRAM:
                empty = series.labels or per_model
                self._histograms[series.key] = {} if empty else {(): Histogram(series.buckets)}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    # Recording.

    def counter(self, name: str, *labels: str) -> None:
        """Add 1 to a declared counter; ``labels`` are its label values in declared order."""
        try:
            self._counters[name][labels] += 1
        except KeyError:
            self._first_count(name, labels, 1)

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Add ``amount`` (not negative) to a declared counter."""
        if amount < 0:
            raise ValueError(f"counter {name!r} cannot go down (amount {amount})")
        try:
            self._counters[name][labels] += amount
        except KeyError:
            self._first_count(name, labels, amount)

    def _first_count(self, name: str, labels: _Labels, amount: float) -> None:
        series = self._declared(name, Kind.COUNTER)
        if len(labels) != len(series.labels):
            raise ValueError(f"counter {name!r} has the labels {series.labels}, got {labels!r}")
        cells = self._counters[name]
        if len(cells) >= MAX_LABEL_SETS:
            labels = (OTHER,) * len(labels)
        cells[labels] = cells.get(labels, 0) + amount

    def observe(self, name: str, value: float, model_id: str = "", vmodel_id: str = "") -> None:
        """Record one value of a histogram without request labels (ms, or bytes as declared)."""
        labels: _Labels = self._model_labels(model_id, vmodel_id) if self._per_model else ()
        series = self._declared(name, Kind.HISTOGRAM)
        if series.labels:
            raise ValueError(f"histogram {name!r} has the labels {series.labels}: not for observe")
        self._histogram(series, labels).observe(value)

    def gauge(self, name: str, value: float | None) -> None:
        """Set a gauge; None takes it off the page (a leader that is one no more)."""
        self._declared(name, Kind.GAUGE)
        if value is None:
            self._gauges.pop(name, None)
        else:
            self._gauges[name] = value

    def gauge_source(self, name: str, read: Callable[[], float | None]) -> None:
        """Have ``read`` called at each scrape: costs the hit path nothing. None hides the gauge."""
        self._declared(name, Kind.GAUGE)
        self._gauges[name] = read

    # Reading.

    def render(self) -> tuple[bytes, str]:
        """(body, content type) of ``/metrics``, ``process_*`` included."""
        body = generate_latest(self._registry)
        for series in self._series.values():
            if series.kind is Kind.COUNTER and not series.name.endswith("_total"):
                # prometheus_client writes ``_total`` into the two header lines of any counter.
                for line in (b"# HELP ", b"# TYPE "):
                    bare = line + series.name.encode()
                    body = body.replace(bare + b"_total ", bare + b" ", 1)
        return body, CONTENT_TYPE

    def value(self, name: str, *labels: str) -> float:
        """What a counter, a gauge or a histogram's count stands at (0 when never recorded)."""
        kind = self._series[name].kind if name in self._series else None
        if kind is Kind.COUNTER:
            return self._counters[name].get(labels, 0)
        if kind is Kind.HISTOGRAM:
            found = self._histograms[name].get(labels)
            return 0 if found is None else found.count
        self._declared(name, Kind.GAUGE)
        return self._gauge_value(name) or 0.0

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(BUILD.name, BUILD.help, labels=BUILD.labels)
        build.add_metric((self._version, self.role.value), 1)
        yield build
        for series in self._series.values():
            match series.kind:
                case Kind.COUNTER:
                    yield self._counter_family(series)
                case Kind.GAUGE:
                    value = self._gauge_value(series.key)
                    if value is not None:
                        yield GaugeMetricFamily(series.name, series.help, value=value)
                case Kind.HISTOGRAM:
                    yield self._histogram_family(series)

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not call ``collect`` and with it the gauge sources."""
        return iter(())

    def _counter_family(self, series: Series) -> Metric:
        cells = self._counters[series.key]
        if series.name.endswith("_total"):
            family = CounterMetricFamily(series.name, series.help, labels=series.labels)
            for labels, value in cells.items():
                family.add_metric(labels, value)
            return family
        bare = Metric(series.name, series.help, "counter")
        for labels, value in cells.items():
            bare.add_sample(series.name, dict(zip(series.labels, labels, strict=True)), value)
        return bare

    def _histogram_family(self, series: Series) -> Metric:
        names = series.labels
        if self._per_model and series.per_model:
            names = (*names, "modelId", "vModelId")
        family = HistogramMetricFamily(series.name, series.help, labels=names)
        for labels, histogram in self._histograms[series.key].items():
            family.add_metric(labels, histogram.cumulative(), histogram.total)
        return family

    def _gauge_value(self, name: str) -> float | None:
        source = self._gauges.get(name)
        return source() if callable(source) else source

    def _declared(self, name: str, kind: Kind) -> Series:
        series = self._series.get(name)
        if series is None or series.kind is not kind:
            known = ", ".join(s.key for s in self._series.values() if s.kind is kind)
            raise KeyError(f"no {kind.value} {name!r} in a {self.role.value}; declared: {known}")
        return series

    # Labels.

    def _histogram(self, series: Series, labels: _Labels) -> Histogram:
        cells = self._histograms[series.key]
        found = cells.get(labels)
        if found is None:
            found = cells[labels] = Histogram(series.buckets)
        return found

    def _request_cell(
        self, method: str, code: int, model_id: str, vmodel_id: str
    ) -> tuple[Histogram, ...]:
        """The histograms of one label set, together: one look-up a request."""
        key = (method, code, model_id, vmodel_id) if self._per_model else (method, code)
        cell = self._request_cells.get(key)
        if cell is None:
            ids = self._model_labels(model_id, vmodel_id) if self._per_model else ()
            labels = (self._method_label(method), _code_label(code), *ids)
            cell = tuple(
                self._histogram(self._series[name], labels) for name in self.request_histograms
            )
            if len(self._request_cells) < MAX_FAST_KEYS:
                self._request_cells[key] = cell
        return cell

    def _method_label(self, method: str) -> str:
        short = _short(method)
        return short if short in self._known_methods else OTHER

    def _model_labels(self, model_id: str, vmodel_id: str) -> tuple[str, str]:
        pair = (model_id, vmodel_id)
        if pair not in self._models:
            if len(self._models) >= self._max_models:
                return (OTHER, OTHER)
            self._models.add(pair)
        return pair


def _short(method: str) -> str:
    return method.rpartition("/")[2]


def _code_label(code: int) -> str:
    try:
        return Code(code).name
    except ValueError:
        return Code.UNKNOWN.name


class RouterMetrics(_Recorder):
    """Series of a router process. Counters: hits, misses, retries (failure), retries_refused,
    placements (reason), errors (reason), loads_requested (outcome), decisions (kind, reason).
    Histogram for ``observe``: cache_miss (ms)."""

    role = Role.ROUTER
    request_histograms = ("api_request", "request_size", "response_size")

    def request_done(
        self,
        method: str,
        code: int,
        duration_ms: float,
        request_bytes: int,
        response_bytes: int,
        model_id: str = "",
        vmodel_id: str = "",
    ) -> None:
        """A client's request is over. ``method``: path or short name, ``code``: gRPC status."""
        duration, request, response = self._request_cell(method, code, model_id, vmodel_id)
        # ``observe`` three times, written out: this runs once a request on the router's one core.
        duration.counts[bisect_left(duration.bounds, duration_ms)] += 1
        duration.total += duration_ms
        request.counts[bisect_left(request.bounds, request_bytes)] += 1
        request.total += request_bytes
        response.counts[bisect_left(response.bounds, response_bytes)] += 1
        response.total += response_bytes


class InstanceMetrics(_Recorder):
    """Series of an instance process. Histograms for ``observe``: loadmodel, unloadmodel,
    req_queue_delay, loading_queue_delay, model_sizing, cache_miss (ms), loaded_model_size (bytes),
    age_at_eviction (ms), batch_size (rows). Counters: loads (model_type, outcome), evictions
    (reason), decisions (kind, reason), loadmodel_failure, unloadmodel_failure,
    unloadmodel_attempt_failure. ``used_bps`` follows from ``used_bytes`` and ``capacity_bytes``."""

    role = Role.INSTANCE
    request_histograms = ("invoke_model",)

    def invoke_done(
        self, method: str, code: int, duration_ms: float, model_id: str = "", vmodel_id: str = ""
    ) -> None:
        """An inference request is over. ``method``: path or short name, ``code``: gRPC status."""
        self.invoke_histogram(method, code, model_id, vmodel_id).observe(duration_ms)

    def invoke_histogram(
        self, method: str, code: int, model_id: str = "", vmodel_id: str = ""
    ) -> Histogram:
        """What ``invoke_done`` observes into, for who records the same thing very often."""
        return self._request_cell(method, code, model_id, vmodel_id)[0]

    def _gauge_value(self, name: str) -> float | None:
        if name != "used_bps":
            return super()._gauge_value(name)
        used, capacity = super()._gauge_value("used_bytes"), super()._gauge_value("capacity_bytes")
        return round(used * 10_000 / capacity) if used is not None and capacity else None


class ControllerMetrics(_Recorder):
    """Series of a controller process. Counters: reconciles (kind, outcome), actions (action)."""

    role = Role.CONTROLLER
