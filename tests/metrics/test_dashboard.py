"""The dashboard and the rules ask only for series and labels that the processes expose."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mesh.metric_series import SERIES, Kind, exposed_names

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy/dashboards/mesh.json"
PROMETHEUS = ROOT / "deploy/prometheus"

AGGREGATORS = {"sum", "min", "max", "avg", "count", "quantile", "topk"}
WORDS = {"by", "without", "and", "or", "unless", "on", "ignoring", "group_left", "group_right",
         "bool", "offset"}  # fmt: skip
# Labels that Prometheus or its list of targets gives.
TARGET_LABELS = {"job", "instance", "router", "le"}
GROUPING = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)"


def series_in(expression: str) -> set[str]:
    """Names of the series that a PromQL expression reads."""
    text = re.sub(r'"[^"]*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    text = re.sub(GROUPING, " ", text)
    names = re.findall(r"[a-zA-Z_:][\w:]*(?!\w)(?!\s*\()", text)
    return {name for name in names if name not in AGGREGATORS | WORDS}


def labels_in(expression: str) -> set[str]:
    names = {
        name.strip() for group in re.findall(GROUPING, expression) for name in group.split(",")
    }
    for matchers in re.findall(r"\{([^}]*)\}", expression):
        names |= set(re.findall(r"(\w+)\s*[=!]", re.sub(r'"[^"]*"', "", matchers)))
    return names - {""}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    return loaded


def panels() -> Iterator[dict[str, Any]]:
    for panel in dashboard()["panels"]:
        if panel["type"] != "row":
            yield panel


def rules() -> list[dict[str, str]]:
    groups = yaml.safe_load((PROMETHEUS / "mesh-rules.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


DASHBOARD_QUERIES = [(p["title"], t["expr"]) for p in panels() for t in p["targets"]]
RULE_QUERIES = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
RECORDED = {rule["record"] for rule in rules() if "record" in rule}
LABELS = TARGET_LABELS | {"version", "role"} | {label for s in SERIES for label in s.labels}


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("sum by (a) (rate(x_total{b=~\"y|z\"}[5m])) / z_sum", {"x_total", "z_sum"}),
        ("count by (version) (up) == 1 or vector(0)", {"up"}),
        ("histogram_quantile(0.99, sum by (le) (rate(q_bucket[$__rate_interval])))", {"q_bucket"}),
        ("max without (i) (a:b:c) - on (j) group_right d", {"a:b:c", "d"}),
    ],
)  # fmt: skip
def test_the_reader_of_expressions_finds_the_series(expression: str, names: set[str]) -> None:
    assert series_in(expression) == names


@pytest.mark.parametrize(("title", "expression"), DASHBOARD_QUERIES + RULE_QUERIES)
def test_a_query_reads_only_what_is_declared(title: str, expression: str) -> None:
    names = series_in(expression)
    assert names, title
    assert names <= exposed_names() | RECORDED | {"up"}, title
    assert labels_in(expression) <= LABELS, title


def test_the_dashboard_shows_every_series() -> None:
    shown = {name for _, expression in DASHBOARD_QUERIES for name in series_in(expression)}
    hidden = [
        series.name
        for series in SERIES
        if not shown & {series.name, series.name + "_bucket", series.name + "_count"}
        # The instant is the age seen from the epoch: one of the two is enough for a person.
        and series.key != "lru_seconds"
    ]
    assert hidden == []


def test_panels_do_not_overlap_and_their_ids_differ() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_times_are_shown_in_the_unit_of_their_series() -> None:
    units = {"milliseconds": "ms", "bytes": "bytes", "": "short"}
    by_bucket = {s.name + "_bucket": units[s.unit] for s in SERIES if s.kind is Kind.HISTOGRAM}
    for panel in panels():
        for target in panel["targets"]:
            for name in series_in(target["expr"]) & by_bucket.keys():
                assert panel["fieldConfig"]["defaults"]["unit"] == by_bucket[name], panel["title"]


def test_every_panel_takes_the_data_source_from_the_variable() -> None:
    board = dashboard()
    assert [v["name"] for v in board["templating"]["list"] if v["type"] == "datasource"]
    for panel in panels():
        assert panel["description"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return subprocess.run(
        [found, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_promtool_accepts_the_configuration() -> None:
    done = promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    done = promtool("test", "rules", str(PROMETHEUS / "mesh-rules.test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_every_query_of_the_dashboard(tmp_path: Path) -> None:
    written = [
        {"record": f"dashboard:{number}", "expr": expr.replace("$__rate_interval", "5m")}
        for number, (_, expr) in enumerate(DASHBOARD_QUERIES)
    ]
    file = tmp_path / "dashboard.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "d", "rules": written}]}), "utf-8")
    done = promtool("check", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_by_the_rules_test_quiet_and_firing() -> None:
    tests = yaml.safe_load((PROMETHEUS / "mesh-rules.test.yml").read_text("utf-8"))["tests"]
    quiet, firing = set(), set()
    for case in (case for test in tests for case in test["alert_rule_test"]):
        (firing if case.get("exp_alerts") else quiet).add(case["alertname"])
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert quiet == firing == alerts
