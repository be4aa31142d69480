"""Measures what a server adds to a bare vLLM: throughput, latency, CPU, memory, and CPU when idle.

    .venv/bin/python -m loadtests.bench overhead --stage tiny-pair

A stage is a base model and a group of servers. They run at the same time and take turns (A B A B …), so a
noisy moment hits all of them. Ratios are computed within a pair; each stage has its own bare vLLM.
"""

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.bench.bespoke_server import BESPOKE
from loadtests.bench.connection import encode_request, encode_turn
from loadtests.bench.load_generator import TurnResult, blocks_in_turn, closed_loop, open_loop, run_on_uvloop
from loadtests.bench.processes import CpuReading, cpu_used, front_end_s, idle_percent
from loadtests.bench.servers import RunningServer, published_adapters, running_servers
from loadtests.bench.statistics import (
    added_latency,
    agreement,
    ms,
    pair_ratios,
    quantile,
    spread,
    summarize,
    turn_figures,
)
from loadtests.bench.vllm_generator import make_order, run_orders
from loadtests.bench.workload import Slo, Workload, body, end_tokens, prompt
from loadtests.peers.vllm_server import BARE

SEED = 1
ADAPTERS = 7  # with the base, eight models in turn
TINY_SLO, SMOL_16, SMOL_64 = Slo(500, 100), Slo(2000, 300), Slo(10_000, 1500)
WORKLOADS = {
    "tiny": (
        Workload("base, 16 streams", 16, 64, 64, mixed=False, slo=TINY_SLO),
        Workload("mixed, 16 streams", 16, 64, 64, mixed=True, slo=TINY_SLO),
    ),
    "smollm2-135m": (
        Workload("mixed, 16 streams", 16, 16, 64, mixed=True, slo=SMOL_16),
        Workload("mixed, 64 streams", 64, 64, 32, mixed=True, slo=SMOL_64),
    ),
}
OPEN_LOAD = 0.6  # of the requests/s that the bare server answered in a closed loop
OPEN_S = 8.0
LATENCY_TOKENS = 8
LATENCY_BLOCK = 21
# A vLLM worker process (ray.serve.llm, `vllm-as-it-comes` have one) spins for a second after its last step.
# A turn that began sooner would be measured beside the spinning of the server before.
QUIET_S = 1.2
IDLE_SETTLE_S = 3.0
console = Console(stderr=True)


@dataclass(frozen=True)
class StageSize:
    """Sets how much a stage measures; `quick` is for a look, not for a report."""

    pairs: int = 5
    latency_blocks: int = 15
    idle_s: float = 20.0
    check_prompts: int = 32

    @classmethod
    def of(cls, *, quick: bool, pairs: int | None) -> "StageSize":
        size = cls(pairs=2, latency_blocks=2, idle_s=5.0, check_prompts=16) if quick else cls()
        return replace(size, pairs=pairs) if pairs else size


class Stage:
    """Gives the servers of a stage their turns and measures them."""

    def __init__(self, base_dir: Path, servers: list[RunningServer], size: StageSize) -> None:
        self._base_dir = base_dir
        self._servers = servers
        self._size = size
        self._ends = end_tokens(base_dir)
        self._batch = 0
        self._idle: dict[str, dict[str, float]] = {}

    def idle(self) -> dict[str, Any]:
        """Measures the CPU of all servers while none has a request."""
        time.sleep(IDLE_SETTLE_S)
        before = {server.name: server.family.read_cpu() for server in self._servers}
        time.sleep(self._size.idle_s)
        for server in self._servers:
            self._idle[server.name] = idle_percent(before[server.name], server.family.read_cpu())
        return {
            name: {
                "percent": round(sum(by_role.values()), 2),
                "seconds": self._size.idle_s,
                "by_role": by_role,
            }
            for name, by_role in self._idle.items()
        }

    def warm_up(self, workload: Workload) -> None:
        for server in self._servers:
            requests = self._requests(server, workload, 0)
            run_on_uvloop(lambda: closed_loop(server.url, requests, workload.streams))  # noqa: B023

    def closed(self, workload: Workload) -> dict[str, Any]:
        """Measures `workload.streams` clients that ask again as soon as they are answered."""
        return self._turns(
            workload, lambda server, requests: closed_loop(server.url, requests, workload.streams)
        )

    def opened(self, workload: Workload, per_s: float) -> dict[str, Any]:
        """Measures Poisson arrivals, at the same moments for each server of a pair."""
        result = self._turns(
            workload, lambda server, requests: open_loop(server.url, requests, per_s, SEED + self._batch)
        )
        return result | {"arrivals_per_s": round(per_s, 2)}

    def latency(self) -> dict[str, Any]:
        """Measures the TTFT of one request at a time, in blocks to each server in turn."""
        requests = [
            [
                self._encode(server, prompt(self._salted(server, 9000), number), LATENCY_TOKENS)
                for number in range(self._size.latency_blocks * LATENCY_BLOCK)
            ]
            for server in self._servers
        ]
        urls = [server.url for server in self._servers]
        by_server = run_on_uvloop(lambda: blocks_in_turn(urls, requests, LATENCY_BLOCK, QUIET_S))
        names = [server.name for server in self._servers]
        results = dict(zip(names, by_server, strict=True))
        ttft_s = {name: [one.ttft_s for one in results[name] if one.ok] for name in names}
        return {
            name: {
                "requests": len(results[name]),
                "failed": len(results[name]) - len(values),
                **{f"p{p}": added_latency(values, ttft_s[BARE], p, SEED) for p in (50, 99)},
                **{f"ttft_p{p}_ms": ms(quantile(values, p)) for p in (50, 99)},
            }
            for name, values in ttft_s.items()
        }

    def check(self, streams: int = 16, tokens: int = 64) -> dict[str, Any]:
        """Sends the same prompts from our load generator and from vLLM's, and compares the tokens counted."""
        texts = {
            server.name: [prompt(self._salted(server, 8000), n) for n in range(self._size.check_prompts)]
            for server in self._servers
        }
        bias = body("", "", tokens=1, end_tokens=self._ends).get("logit_bias")
        extra = {"logit_bias": bias} if bias else {}
        vllm_results = run_orders(
            [
                make_order(running.server, texts[running.name], tokens, streams, extra)
                for running in self._servers
            ],
            self._base_dir,
            SEED,
        )
        checks = {}
        for server in self._servers:
            requests = [self._encode(server, text, tokens) for text in texts[server.name]]
            turn = run_on_uvloop(lambda: closed_loop(server.url, requests, streams))  # noqa: B023
            figures, vllm = turn_figures(turn, TINY_SLO), vllm_results[server.name]
            ours = {"prompt_tokens": figures["prompt_tokens"], "completion_tokens": figures["tokens"]}
            theirs = {
                "prompt_tokens": vllm["total_input_tokens"],
                "completion_tokens": vllm["total_output_tokens"],
            }
            check = agreement(ours, theirs, tokens * len(requests))
            checks[server.name] = check | {"vllm_benchmarks_says": vllm}
        return checks

    def memory(self) -> dict[str, dict[str, int]]:
        return {server.name: server.family.memory_mb() for server in self._servers}

    def _turns(
        self,
        workload: Workload,
        send: Callable[[RunningServer, list[bytes]], Awaitable[TurnResult]],
    ) -> dict[str, Any]:
        turns: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for _ in range(self._size.pairs):
            self._batch += 1
            for server in self._servers:
                requests = self._requests(server, workload, self._batch)
                time.sleep(QUIET_S)
                before, own_s = server.family.read_cpu(), time.process_time()
                turn = run_on_uvloop(lambda: send(server, requests))  # noqa: B023
                own_s = time.process_time() - own_s
                figures = self._figures(server, turn, workload, before)
                thousands = max(figures["tokens"], 1) / 1000
                turns[server.name].append(figures | {"generator_cpu_s_per_1k": round(own_s / thousands, 4)})
        return {
            "work": {
                "streams": workload.streams,
                "requests_a_turn": workload.requests,
                "tokens": workload.tokens,
                "mixed": workload.mixed,
                "slo": asdict(workload.slo),
            },
            "servers": {name: compare(of_server, turns[BARE]) for name, of_server in turns.items()},
        }

    def _figures(
        self, server: RunningServer, turn: TurnResult, workload: Workload, before: CpuReading
    ) -> dict[str, Any]:
        figures = turn_figures(turn, workload.slo)
        cpu_s, thousands = cpu_used(before, server.family.read_cpu()), max(figures["tokens"], 1) / 1000
        front_s = front_end_s(cpu_s, turn.wall_s, self._idle.get(server.name, {}))
        by_role = {name: round(s / thousands, 4) for name, s in cpu_s.items() if s / thousands >= 0.0005}
        return figures | {
            "cpu_s_per_1k": round(sum(cpu_s.values()) / thousands, 4),
            "front_cpu_s_per_1k": round(front_s / thousands, 4),
            "cpu_s_per_1k_by_role": by_role,
        }

    def _requests(self, running: RunningServer, workload: Workload, batch: int) -> list[bytes]:
        return encode_turn(running.server, workload, self._salted(running, batch), self._ends)

    def _encode(self, running: RunningServer, text: str, tokens: int) -> bytes:
        """Encodes a request for the base model."""
        server = running.server
        fields = body(server.model, text, tokens=tokens, end_tokens=self._ends)
        return encode_request(server.url, server.key, fields)

    def _salted(self, running: RunningServer, batch: int) -> int:
        return batch + 100 * running.salt


def compare(turns: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians over a server's turns and ratios to the bare server's turn of the same pair."""

    def ratio(name: str) -> dict[str, float] | None:
        pairs = pair_ratios([turn[name] for turn in turns], [turn[name] for turn in baseline])
        return spread(pairs) if pairs else None

    roles = {name for turn in turns for name in turn["cpu_s_per_1k_by_role"]}
    by_role = {r: spread([t["cpu_s_per_1k_by_role"].get(r, 0.0) for t in turns], 4)["median"] for r in roles}
    return summarize(turns) | {
        "ratio": ratio("tokens_per_s"),
        "front_cpu_ratio": ratio("front_cpu_s_per_1k"),
        "tokens_per_s_spread": spread([turn["tokens_per_s"] for turn in turns], 2),
        "cpu_s_per_1k_by_role": dict(sorted(by_role.items(), key=lambda item: -item[1])),
        "turns": turns,
    }


def measure(home: Path, base: str, peers: tuple[str, ...], size: StageSize) -> dict[str, Any]:
    """Runs one stage and prints its figures as they come."""
    tiny, result = base == "tiny", {}
    with published_adapters(home, base, ADAPTERS) as adapters:
        console.print(f"starting {', '.join((BESPOKE, BARE, *peers))} with {base}")
        with running_servers(home, base, adapters, peers) as servers:
            stage = Stage((home / "bases" / base).resolve(), servers, size)
            for workload in WORKLOADS[base]:
                stage.warm_up(workload)
            result["idle"] = stage.idle()
            for name, idle in result["idle"].items():
                console.print(f"idle, % of a core: {name} {idle['percent']} {idle['by_role']}")
            if tiny:
                result["latency"] = stage.latency()
                added_ms = {
                    name: (latency["p50"]["ms"], latency["p99"]["ms"])
                    for name, latency in result["latency"].items()
                }
                console.print(added_ms, "ms added to TTFT, p50 and p99")
            result["closed"] = {}
            for workload in WORKLOADS[base]:
                result["closed"][workload.name] = stage.closed(workload)
                _print(workload.name, result["closed"][workload.name])
            if tiny:
                mixed = WORKLOADS[base][-1]
                per_s = OPEN_LOAD * result["closed"][mixed.name]["servers"][BARE]["requests_per_s"]
                arrivals = Workload(
                    "open loop", 0, max(8, int(per_s * OPEN_S)), mixed.tokens, True, mixed.slo
                )
                result["open"] = stage.opened(arrivals, per_s)
                _print(arrivals.name, result["open"])
                result["check"] = stage.check()
                agree = {name: check["agree"] for name, check in result["check"].items()}
                console.print(agree, "the generators agree")
            result["memory_mb"] = stage.memory()
            result["leaves_out"] = {running.name: running.server.leaves_out for running in servers}
    return result | {
        "base": base,
        "peers": list(peers),
        "pairs": size.pairs,
        "seed": SEED,
        "adapters": ADAPTERS,
    }


def _print(workload: str, result: dict[str, Any]) -> None:
    for server, figures in result["servers"].items():
        ratio, cpu = figures["ratio"] or {}, figures["front_cpu_ratio"] or {}
        console.print(
            f"{workload:18} {server:22} {figures['tokens_per_s']:8.1f} tok/s, "
            f"{ratio.get('median', 0):.3f} of bare "
            f"({ratio.get('low', 0):.3f} to {ratio.get('high', 0):.3f}); "
            f"TTFT p50 {figures['ttft_p50_ms']:.0f} ms; "
            f"front end {1000 * figures['front_cpu_s_per_1k']:.0f} µs a token "
            f"({cpu.get('median', 0):.2f} of bare)"
            + (f"; {figures['failed']} failed: {figures.get('errors')}" if figures["failed"] else "")
        )
