"""Servers beside each other on the same work: throughput, latency, CPU, memory, and what idleness costs.

    .venv/bin/python -m loadtests.bench front --stage tiny-pair

A stage is a base and a group of servers that all run at once and take turns (A B A B …), so that a noisy
moment hits all of them. Ratios are made within a pair; each stage has its own bare vLLM.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.bench.connection import encoded, requests_of
from loadtests.bench.figures import added, agreement, figures, ms, over, paired, quantile, spread
from loadtests.bench.group import BARE, Running, published, started
from loadtests.bench.load import Run, alternating, closed, opened, run
from loadtests.bench.ours import NAME
from loadtests.bench.processes import front_s, idle_percent, used
from loadtests.bench.vllm_generator import measured, order
from loadtests.bench.work import Slo, Work, body, end_tokens, prompt

SEED = 1
ADAPTERS = 7  # with the base, eight models in turn
TINY_SLO, SMOL_16, SMOL_64 = Slo(500, 100), Slo(2000, 300), Slo(10_000, 1500)
WORKS = {
    "tiny": (
        Work("base, 16 streams", 16, 64, 64, mixed=False, slo=TINY_SLO),
        Work("mixed, 16 streams", 16, 64, 64, mixed=True, slo=TINY_SLO),
    ),
    "smollm2-135m": (
        Work("mixed, 16 streams", 16, 16, 64, mixed=True, slo=SMOL_16),
        Work("mixed, 64 streams", 64, 64, 32, mixed=True, slo=SMOL_64),
    ),
}
OPEN_LOAD = 0.6  # of the requests/s that the bare server answered in a closed loop
OPEN_S = 8.0
LATENCY_TOKENS = 8
LATENCY_BLOCK = 21
# Where vLLM has a worker process (ray.serve.llm, `vllm-as-it-comes`) it spins for a second after its last
# step: what begins sooner is measured beside the spinning of the server before.
QUIET_S = 1.2
IDLE_SETTLE_S = 3.0
console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """How long a stage measures; `quick` is for a look, not for a report."""

    pairs: int = 5
    latency_blocks: int = 15
    idle_s: float = 20.0
    check_prompts: int = 32

    @classmethod
    def of(cls, *, quick: bool, pairs: int | None) -> "Plan":
        plan = cls(pairs=2, latency_blocks=2, idle_s=5.0, check_prompts=16) if quick else cls()
        return replace(plan, pairs=pairs) if pairs else plan


class Stage:
    """The servers of a stage, and their turns."""

    def __init__(self, base_dir: Path, servers: list[Running], plan: Plan) -> None:
        self._base_dir = base_dir
        self._servers = servers
        self._plan = plan
        self._ends = end_tokens(base_dir)
        self._batch = 0
        self._idle: dict[str, dict[str, float]] = {}

    def idle(self) -> dict[str, Any]:
        """All servers are idle at once, so one wait measures all."""
        time.sleep(IDLE_SETTLE_S)
        before = {one.name: one.family.moment() for one in self._servers}
        time.sleep(self._plan.idle_s)
        for one in self._servers:
            self._idle[one.name] = idle_percent(before[one.name], one.family.moment())
        return {
            name: {
                "percent": round(sum(by_role.values()), 2),
                "seconds": self._plan.idle_s,
                "by_role": by_role,
            }
            for name, by_role in self._idle.items()
        }

    def warm_up(self, work: Work) -> None:
        for one in self._servers:
            run(lambda one=one: closed(one.server.url, self._requests(one, work, 0), work.streams))  # type: ignore[misc]

    def closed(self, work: Work) -> dict[str, Any]:
        return self._turns(work, lambda one, requests: closed(one.server.url, requests, work.streams))

    def opened(self, work: Work, per_s: float) -> dict[str, Any]:
        """Poisson arrivals, the same moments for each server of a pair."""
        told = self._turns(
            work, lambda one, requests: opened(one.server.url, requests, per_s, SEED + self._batch)
        )
        return told | {"arrivals_per_s": round(per_s, 2)}

    def latency(self) -> dict[str, Any]:
        """One request at a time, in blocks to each server in turn."""
        requests = [
            [
                self._encode(one, one.server.model, prompt(self._salted(one, 9000), number), LATENCY_TOKENS)
                for number in range(self._plan.latency_blocks * LATENCY_BLOCK)
            ]
            for one in self._servers
        ]
        urls = [one.server.url for one in self._servers]
        answers = run(lambda: alternating(urls, requests, LATENCY_BLOCK, QUIET_S))
        told = {one.name: mine for one, mine in zip(self._servers, answers, strict=True)}
        ttft_s = {name: [answer.ttft_s for answer in mine if answer.ok] for name, mine in told.items()}
        return {
            name: {
                "requests": len(told[name]),
                "failed": len(told[name]) - len(values),
                **{f"p{p}": added(values, ttft_s[BARE], p, SEED) for p in (50, 99)},
                **{f"ttft_p{p}_ms": ms(quantile(values, p)) for p in (50, 99)},
            }
            for name, values in ttft_s.items()
        }

    def check(self, streams: int = 16, tokens: int = 64) -> dict[str, Any]:
        """The same prompts from our load generator and from vLLM's: do they count the same tokens?"""
        texts = {one.name: [prompt(self._salted(one, 8000), n) for n in range(self._plan.check_prompts)]
                 for one in self._servers}  # fmt: skip
        bias = body("", "", tokens=1, end_tokens=self._ends).get("logit_bias")
        extra = {"logit_bias": bias} if bias else {}
        said = measured(
            [order(one.server, texts[one.name], tokens, streams, extra) for one in self._servers],
            self._base_dir,
            SEED,
        )
        checked = {}
        for one in self._servers:
            requests = [self._encode(one, one.server.model, text, tokens) for text in texts[one.name]]
            told = figures(run(lambda: closed(one.server.url, requests, streams)), TINY_SLO)  # noqa: B023
            theirs = said[one.name]
            ours = {"prompt_tokens": told["prompt_tokens"], "completion_tokens": told["tokens"]}
            counted = {"prompt_tokens": theirs["total_input_tokens"],
                       "completion_tokens": theirs["total_output_tokens"]}  # fmt: skip
            checked[one.name] = agreement(ours, counted, tokens * len(requests)) | {
                "vllm_benchmarks_says": theirs
            }
        return checked

    def memory(self) -> dict[str, dict[str, int]]:
        return {one.name: one.family.memory_mb() for one in self._servers}

    def _turns(self, work: Work, go: Callable[[Running, list[bytes]], Any]) -> dict[str, Any]:
        turns: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for _ in range(self._plan.pairs):
            self._batch += 1
            for one in self._servers:
                requests = self._requests(one, work, self._batch)
                time.sleep(QUIET_S)
                before, own_s = one.family.moment(), time.process_time()
                taken: Run = run(lambda: go(one, requests))  # noqa: B023
                own_s = time.process_time() - own_s
                told = self._figures(one, taken, work, before)
                thousands = max(told["tokens"], 1) / 1000
                turns[one.name].append(told | {"generator_cpu_s_per_1k": round(own_s / thousands, 4)})
        return {
            "work": {"streams": work.streams, "requests_a_turn": work.requests, "tokens": work.tokens,
                     "mixed": work.mixed, "slo": asdict(work.slo)},
            "servers": {name: beside(taken, turns[BARE]) for name, taken in turns.items()},
        }  # fmt: skip

    def _figures(self, one: Running, taken: Run, work: Work, before: Any) -> dict[str, Any]:
        told = figures(taken, work.slo)
        cpu_s, thousands = used(before, one.family.moment()), max(told["tokens"], 1) / 1000
        front = front_s(cpu_s, taken.wall_s, self._idle.get(one.name, {}))
        by_role = {name: round(s / thousands, 4) for name, s in cpu_s.items() if s / thousands >= 0.0005}
        return told | {
            "cpu_s_per_1k": round(sum(cpu_s.values()) / thousands, 4),
            "front_cpu_s_per_1k": round(front / thousands, 4),
            "cpu_s_per_1k_by_role": by_role,
        }

    def _requests(self, one: Running, work: Work, batch: int) -> list[bytes]:
        return requests_of(one.server, work, self._salted(one, batch), self._ends)

    def _encode(self, one: Running, model: str, text: str, tokens: int) -> bytes:
        return encoded(
            one.server.url, one.server.key, body(model, text, tokens=tokens, end_tokens=self._ends)
        )

    def _salted(self, one: Running, batch: int) -> int:
        return batch + 100 * one.salt


def beside(taken: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns, and the ratios to the bare server's turn of the same pair."""

    def ratio(name: str) -> dict[str, float] | None:
        pairs = paired([turn[name] for turn in taken], [turn[name] for turn in baseline])
        return spread(pairs) if pairs else None

    roles = {name for turn in taken for name in turn["cpu_s_per_1k_by_role"]}
    by_role = {r: spread([t["cpu_s_per_1k_by_role"].get(r, 0.0) for t in taken], 4)["median"] for r in roles}
    return over(taken) | {
        "ratio": ratio("tokens_per_s"),
        "front_cpu_ratio": ratio("front_cpu_s_per_1k"),
        "tokens_per_s_spread": spread([turn["tokens_per_s"] for turn in taken], 2),
        "cpu_s_per_1k_by_role": dict(sorted(by_role.items(), key=lambda item: -item[1])),
        "turns": taken,
    }


def measure(home: Path, base: str, peers: tuple[str, ...], plan: Plan) -> dict[str, Any]:
    """One stage, told as it goes."""
    tiny, told = base == "tiny", {}
    with published(home, base, ADAPTERS) as adapters:
        console.print(f"starting {', '.join((NAME, BARE, *peers))} with {base}")
        with started(home, base, adapters, peers) as servers:
            stage = Stage((home / "bases" / base).resolve(), servers, plan)
            for work in WORKS[base]:
                stage.warm_up(work)
            told["idle"] = stage.idle()
            for name, one in told["idle"].items():
                console.print(f"idle, % of a core: {name} {one['percent']} {one['by_role']}")
            if tiny:
                told["latency"] = stage.latency()
                added_ms = {
                    name: (one["p50"]["ms"], one["p99"]["ms"]) for name, one in told["latency"].items()
                }
                console.print(added_ms, "ms added to TTFT, p50 and p99")
            told["closed"] = {}
            for work in WORKS[base]:
                told["closed"][work.name] = stage.closed(work)
                _tell(work.name, told["closed"][work.name])
            if tiny:
                mixed = WORKS[base][-1]
                per_s = OPEN_LOAD * told["closed"][mixed.name]["servers"][BARE]["requests_per_s"]
                arrivals = Work("open loop", 0, max(8, int(per_s * OPEN_S)), mixed.tokens, True, mixed.slo)
                told["open"] = stage.opened(arrivals, per_s)
                _tell(arrivals.name, told["open"])
                told["check"] = stage.check()
                console.print(
                    {name: one["agree"] for name, one in told["check"].items()}, "the generators agree"
                )
            told["memory_mb"] = stage.memory()
            told["leaves_out"] = {one.name: one.server.leaves_out for one in servers}
    return told | {
        "base": base,
        "peers": list(peers),
        "pairs": plan.pairs,
        "seed": SEED,
        "adapters": ADAPTERS,
    }


def _tell(name: str, told: dict[str, Any]) -> None:
    for server, one in told["servers"].items():
        ratio, cpu = one["ratio"] or {}, one["front_cpu_ratio"] or {}
        console.print(
            f"{name:18} {server:22} {one['tokens_per_s']:8.1f} tok/s, {ratio.get('median', 0):.3f} of bare "
            f"({ratio.get('low', 0):.3f} to {ratio.get('high', 0):.3f}); "
            f"TTFT p50 {one['ttft_p50_ms']:.0f} ms; "
            f"front {1000 * one['front_cpu_s_per_1k']:.0f} µs a token ({cpu.get('median', 0):.2f} of bare)"
            + (f"; {one['failed']} failed: {one.get('errors')}" if one["failed"] else "")
        )
