"""Reads the PromQL queries of dashboards and rules, and checks the metrics they rely on."""

import json
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
DASHBOARDS = sorted((CONFIGS / "dashboards").glob("*.json"))
RULES = [CONFIGS / "prometheus" / name for name in ("recording.yaml", "alerts.yaml")]
# Grafana's variables, with a value for each.
VARIABLES = {"$__rate_interval": "5m", "$__range": "6h"}
LABEL_VALUES = re.compile(r"label_values\((?P<series>.+), (?P<label>\w+)\)")


@dataclass(frozen=True)
class Query:
    """A query. `where` is for people; `record` is the name under which Prometheus stores its result."""

    where: str
    text: str
    record: str | None = None

    @property
    def parsed(self) -> promql_parser.Expr:
        text = self.text
        for variable, value in VARIABLES.items():
            text = text.replace(variable, value)
        return promql_parser.parse(text)


def dashboard(path: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(path.read_text())
    return board


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", ())


def of_dashboard(path: Path) -> Iterator[Query]:
    board = dashboard(path)
    for panel in panels(board):
        for target in panel.get("targets", ()):
            yield Query(f"{path.name}: {panel['title']}", target["expr"])
    for note in board["annotations"]["list"]:
        if "expr" in note:
            yield Query(f"{path.name}: annotation {note['name']}", note["expr"])
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            match = LABEL_VALUES.fullmatch(variable["query"]["query"])
            assert match, variable["query"]
            text = f"count by ({match['label']}) ({match['series']})"
            yield Query(f"{path.name}: variable {variable['name']}", text)


def rules(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def of_rules(path: Path) -> Iterator[Query]:
    for rule in rules(path):
        yield Query(f"{path.name}: {rule.get('alert', rule.get('record'))}", rule["expr"], rule.get("record"))


Labels = Mapping[str, frozenset[str]]
_CHOOSING = {"topk", "bottomk"}  # aggregations that keep the labels of what they choose


def missing(query: Query, known: Labels) -> list[str]:
    """The metrics and labels that the query needs and no metric has."""
    try:
        _result(query.parsed, known)
    except LookupError as error:
        return [str(error)]
    return []


def result_labels(query: Query, known: Labels) -> frozenset[str]:
    """The labels of its result. known: the labels of each metric."""
    return _result(query.parsed, known)


def _result(node: Any, known: Labels) -> frozenset[str]:
    """Raises LookupError."""
    match node:
        case promql_parser.VectorSelector():
            if node.name not in known:
                raise LookupError(f"no metric {node.name}")
            return _have(node.name, known[node.name], {each.name for each in node.matchers.matchers})
        case promql_parser.MatrixSelector():
            return _result(node.vector_selector, known)
        case promql_parser.AggregateExpr():
            inner = _result(node.expr, known)
            if node.modifier is None:
                return inner if str(node.op) in _CHOOSING else frozenset()
            named = frozenset(node.modifier.labels)
            by = node.modifier.type == promql_parser.AggModifierType.By
            return _have(node.expr.prettify(), inner, named) & named if by else inner - named
        case promql_parser.BinaryExpr():
            sides = [_result(side, known) for side in (node.lhs, node.rhs)]
            matching = None if node.modifier is None else node.modifier.matching
            if matching is not None and matching.type == promql_parser.LabelModifierType.Include:
                for side in sides:
                    _have(node.prettify(), side, set(matching.labels))
            return sides[0] | sides[1]
        case promql_parser.Call():
            inner = frozenset().union(*(_result(argument, known) for argument in node.args))
            return inner - {"le"} if node.func.name == "histogram_quantile" else inner
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            return _result(node.expr, known)
    return frozenset()  # numbers and strings


def _have(what: str, labels: frozenset[str], wanted: Set[str]) -> frozenset[str]:
    if not wanted <= labels:
        raise LookupError(f"{what} has no label {', '.join(sorted(wanted - labels))}")
    return labels
