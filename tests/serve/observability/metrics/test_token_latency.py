"""Checks the inter-token latency of requests, and its histogram."""

import pytest

from serve.engine.protocol import Delta
from serve.observability.metrics import Metrics, TokenLatency
from serve.observability.metrics import token_latency as module
from serve.observability.metrics.token_latency import BUCKETS_S


def tokens(*counts: int) -> list[Delta]:
    return [Delta(index, "x", count) for index, count in enumerate(counts)]


def paced(
    monkeypatch: pytest.MonkeyPatch, steps: list[tuple[float, list[Delta]]], choices: int = 1
) -> TokenLatency:
    """Returns the latencies of a request whose deltas come at these times."""
    pace = TokenLatency(choices)
    for at_s, deltas in steps:
        monkeypatch.setattr(module, "monotonic", lambda at_s=at_s: at_s)
        pace.note(deltas)
    return pace


def buckets(pace: TokenLatency) -> dict[float, int]:
    bounds = (*BUCKETS_S, float("inf"))
    return {bound: count for bound, count in zip(bounds, pace.counts, strict=True) if count}


def test_the_first_token_has_no_latency_between_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert buckets(paced(monkeypatch, [(10.0, tokens(1))])) == {}


def test_each_later_token_counts_in_the_smallest_bucket_that_holds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pace = paced(monkeypatch, [(10.0, tokens(1)), (10.25, tokens(1)), (10.253, tokens(1)), (20.0, tokens(1))])
    assert buckets(pace) == {0.25: 1, 0.005: 1, float("inf"): 1}
    assert pace.sum_s == pytest.approx(10.0)


def test_tokens_that_come_together_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = paced(monkeypatch, [(10.0, tokens(1)), (10.16, tokens(4))])
    assert buckets(pace) == {0.05: 4}
    assert pace.sum_s == pytest.approx(0.16)


def test_each_choice_has_a_pace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(10.0, tokens(1, 1)), (10.04, [Delta(0, "x", 1)]), (10.08, [Delta(1, "x", 1)])]
    assert buckets(paced(monkeypatch, steps, choices=2)) == {0.05: 1, 0.1: 1}


def test_what_holds_no_token_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(10.0, tokens(1)), (10.02, tokens(0)), (10.04, tokens(1))]
    assert buckets(paced(monkeypatch, steps)) == {0.05: 1}


def test_requests_add_up_by_base_and_by_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(adapters_max=1)
    pace = paced(monkeypatch, [(10.0, tokens(1)), (10.04, tokens(1)), (10.24, tokens(1)), (19.0, tokens(1))])
    for adapter in (None, "acme/a@1", "acme/b@1"):
        metrics.token_latency("tiny", adapter, pace)
    value = metrics.registry.get_sample_value
    name, base = "bespoke_inter_token_latency_seconds", {"base": "tiny"}
    cumulative = {
        bound: value(f"{name}_bucket", {**base, "le": bound}) for bound in ("0.03", "0.05", "0.25", "+Inf")
    }
    assert cumulative == {"0.03": 0, "0.05": 3, "0.25": 6, "+Inf": 9}
    assert value(f"{name}_count", base) == 9
    assert value(f"{name}_sum", base) == pytest.approx(27.0)
    for adapter in ("none", "acme/a@1", "other"):
        labels = {**base, "adapter": adapter}
        by_bound = [
            value("bespoke_adapter_inter_token_latency_seconds_bucket", {**labels, "le": bound})
            for bound in ("0.03", "0.1", "0.25", "1.0", "+Inf")
        ]
        assert by_bound == [0, 1, 2, 2, 3]
