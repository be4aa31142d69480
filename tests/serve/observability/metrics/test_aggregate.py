"""Checks that each gateway answers with one exposition of all gateways."""

from pathlib import Path

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serve.deployment.app import build_app
from serve.engine.metrics import render_engines
from serve.observability.metrics import Exposition, Metrics, merge, render_aggregate
from serve.settings import Settings
from tests.support.exposition import busy
from tests.support.scripted_app import HELLO, ScriptedEngine

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: bytes) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


class Peers:
    """Stands in for gateway `a` and others. None does not answer."""

    def __init__(self, *others: Metrics | None, wanted: int = 1) -> None:
        self.name = "a"
        self.wanted = wanted
        self.others = others

    async def expositions(self) -> list[Exposition | None]:
        return [None if metrics is None else metrics.exposition() for metrics in self.others]


def gateway(name: str, requests: int) -> Metrics:
    metrics = Metrics(gateway=name)
    for _ in range(requests):
        metrics.request("/v1/models", 200, 0.1)
    return metrics


def scrape(home: Path, pool: Peers | None) -> Samples:
    app = build_app(Settings(home=home), {"tiny": ScriptedEngine(HELLO)}, peers=pool)
    with TestClient(app) as client:
        return samples(client.get("/metrics").content)


def by_gateway(samples: Samples, name: str) -> dict[str, float]:
    return {dict(labels)["gateway"]: value for (series, labels), value in samples.items() if series == name}


def single(samples: Samples, name: str) -> float:
    return samples[name, frozenset()]


def test_whichever_gateway_is_asked_all_are_heard(tmp_path: Path) -> None:
    samples = scrape(tmp_path, Peers(gateway("b", 2), gateway("c", 3)))
    assert by_gateway(samples, "bespoke_requests_total") == {"b": 2, "c": 3}
    assert by_gateway(samples, "bespoke_requests_in_progress") == {"a": 0, "b": 0, "c": 0}


def test_one_that_does_not_answer_is_missing_and_counted(tmp_path: Path) -> None:
    samples = scrape(tmp_path, Peers(gateway("a", 0), gateway("b", 2), None))
    assert by_gateway(samples, "bespoke_requests_total") == {"b": 2}
    assert (single(samples, "bespoke_gateways"), single(samples, "bespoke_gateways_answering")) == (3, 2)


def test_when_nobody_answers_a_gateway_speaks_for_itself_and_tells_how_many_there_should_be(
    tmp_path: Path,
) -> None:
    samples = scrape(tmp_path, Peers(wanted=3))
    assert by_gateway(samples, "bespoke_requests_in_progress") == {"a": 0}
    assert (single(samples, "bespoke_gateways"), single(samples, "bespoke_gateways_answering")) == (3, 1)


def test_without_peers_a_gateway_is_the_only_one(tmp_path: Path) -> None:
    samples = scrape(tmp_path, None)
    assert (single(samples, "bespoke_gateways"), single(samples, "bespoke_gateways_answering")) == (1, 1)


def test_an_engine_that_is_down_has_no_replicas(tmp_path: Path) -> None:
    samples = scrape(tmp_path, None)
    assert samples["bespoke_engine_replicas", frozenset({("base", "tiny")})] == 0


def test_merged_expositions_have_each_family_once_and_every_sample_as_it_was() -> None:
    other = Metrics(gateway="other")
    other.request('/v1/"odd"\\\n# HELP route', 200, 0.1)
    other.request("/v1/models", 200, 0.1)
    texts = [
        busy().exposition().text,
        other.exposition().text,
        render_engines([]),
        render_aggregate(2, 2, {}),
    ]
    merged = merge(texts)
    described = [line for line in merged.splitlines() if line.startswith((b"# HELP", b"# TYPE"))]
    assert len(described) == len(set(described))
    apart: Samples = {}
    for text in texts:
        apart |= samples(text)
    # Except for what changes meanwhile: memory, CPU time.
    assert samples(merged).keys() == apart.keys()
    assert samples(merged) == apart


def test_each_series_of_a_gateway_bears_its_name() -> None:
    for name, labels in samples(busy().exposition().text):
        assert ("gateway", "busy") in labels, name
