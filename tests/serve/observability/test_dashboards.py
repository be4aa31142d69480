"""Checks every query of every dashboard and rule against /metrics: a renamed metric fails here."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.constants import TENANTS, TINY
from tests.support.exposition import Names, declared, names
from tests.support.live_service import LiveService
from tests.support.queries import (
    CONFIGS,
    DASHBOARDS,
    RULES,
    Query,
    dashboard,
    missing,
    of_dashboard,
    of_rules,
    panels,
    result_labels,
    rules,
)

TARGET = frozenset({"job", "instance"})  # Prometheus' own, in all that it scrapes
OWN = {"up": TARGET, "ALERTS": TARGET | {"alertname", "alertstate", "severity"}}
QUERIES = [query for path in RULES for query in of_rules(path)] + [
    query for path in DASHBOARDS for query in of_dashboard(path)
]
BOARDS = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
# The metrics that a new service without failures does not expose yet.
LATER = {
    *("bespoke_limit_rejections_total", "bespoke_errors_total", "bespoke_streams_broken_total"),
    *("bespoke_budget_used_ratio", "bespoke_ledger_drift_tokens", "bespoke_ledger_drift_timestamp_seconds"),
    *("bespoke_steward_job_age_seconds",),
}


@pytest.fixture(scope="module")
def known() -> Names:
    """Returns labels by metric, with those of recorded queries and Prometheus' own."""
    found = {name: labels | TARGET for name, labels in declared().items()} | OWN
    for query in QUERIES:
        if query.record is not None:
            found[query.record] = result_labels(query, found)
    return found


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_a_query_asks_for_metrics_and_labels_that_there_are(query: Query, known: Names) -> None:
    assert missing(query, known) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("sum(rate(bespoke_request_total[5m]))", "no metric bespoke_request_total"),
        ('sum(bespoke_tokens_total{model="tiny"})', "bespoke_tokens_total has no label model"),
        ("sum by (adapter) (bespoke_tokens_total)", "bespoke_tokens_total has no label adapter"),
        ("bespoke_steward_up / on (base) bespoke_engine_replicas", "has no label base"),
        ("histogram_quantile(0.9, sum by (le) (rate(bespoke_tokens_total[5m])))", "has no label le"),
    ],
)
def test_a_query_for_what_is_not_there_is_found(text: str, wrong: str, known: Names) -> None:
    (found,) = missing(Query("here", text), known)
    assert wrong in found


def test_alerts_speak_only_of_labels_that_their_queries_have(known: Names) -> None:
    for rule in rules(CONFIGS / "prometheus" / "alerts.yaml"):
        labels = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert labels <= result_labels(Query(rule["alert"], rule["expr"]), known), rule["alert"]


@BOARDS
def test_legends_speak_only_of_labels_that_their_queries_have(path: Path, known: Names) -> None:
    for panel in panels(dashboard(path)):
        for target in panel.get("targets", ()):
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= result_labels(Query(panel["title"], target["expr"]), known), panel["title"]


@BOARDS
def test_a_dashboard_is_one_that_grafana_imports(path: Path) -> None:
    board = dashboard(path)
    assert board["schemaVersion"] >= 36  # Grafana 9 and later read it, and migrate it themselves
    source, *variables = board["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert "base" in {variable["name"] for variable in variables}
    ids = [panel["id"] for panel in panels(board)]
    assert len(ids) == len(set(ids))
    assert {panel["type"] for panel in panels(board)} <= {"row", "stat", "timeseries", "table", "bargauge"}
    for panel in panels(board):
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["targets"], panel["title"]
    assert set(_sources(board)) == {"${datasource}", "-- Grafana --"}


@BOARDS
def test_no_two_panels_lie_over_each_other(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(path)["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_each_alert_has_a_situation_in_which_it_fires_and_a_line_that_says_what_to_do() -> None:
    alerts = rules(CONFIGS / "prometheus" / "alerts.yaml")
    tried = yaml.safe_load((CONFIGS / "prometheus" / "alerts.test.yaml").read_text())["tests"]
    firing = {
        label
        for test in tried
        for expected in test["promql_expr_test"]
        for sample in expected["exp_samples"]
        for label in re.findall(r'alertname="(\w+)"', sample["labels"])
    }
    assert firing == {rule["alert"] for rule in alerts}
    manual = (CONFIGS.parent / "docs" / "observability.md").read_text()
    for rule in alerts:
        assert f"### {rule['alert']}\n" in manual
        assert rule["annotations"]["runbook"] == f"docs/observability.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket", "info")


def test_the_manual_names_every_metric() -> None:
    manual = (CONFIGS.parent / "docs" / "observability.md").read_text()
    families = {
        re.sub("_(bucket|sum|count)$", "", name) for name in declared() if name.startswith("bespoke_")
    }
    assert {name for name in families if f"`{name}`" not in manual} == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "recording.yaml", "alerts.yaml"),
        ("test", "rules", "alerts.test.yaml"),
    ],
    ids=" ".join,
)
def test_promtool_agrees(check: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *check], cwd=CONFIGS / "prometheus", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_running_service_says_all_that_is_declared_and_nothing_else(live: LiveService) -> None:
    for model in (TINY, f"{TENANTS[0]}/support"):
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert live.post(body).status_code == 200
    live.wait_idle()
    exposed, possible = names(httpx.get(f"{live.url}/metrics", timeout=60).text), declared()
    surplus = {name for name in exposed if name not in possible or not exposed[name] <= possible[name]}
    assert surplus == set()
    assert {name for name in possible if name not in exposed} <= LATER
    unlike = {name: (exposed[name], possible[name]) for name in exposed if exposed[name] != possible[name]}
    assert unlike == {}


def _sources(node: Any) -> list[str]:
    """Yields the uid of every data source that is named anywhere in a dashboard."""
    if isinstance(node, list):
        return [uid for each in node for uid in _sources(each)]
    if not isinstance(node, dict):
        return []
    here = [node["datasource"]["uid"]] if isinstance(node.get("datasource"), dict) else []
    return here + [uid for each in node.values() for uid in _sources(each)]
