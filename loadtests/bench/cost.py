"""What a token and what a request cost each process: the CPU of two loads, taken apart.

Many short answers are mostly requests, few long ones mostly tokens: CPU = a × tokens + b × requests.
"""

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.bench.connection import requests_of
from loadtests.bench.front import ADAPTERS, QUIET_S, TINY_SLO
from loadtests.bench.group import Running, published, started
from loadtests.bench.load import closed, run
from loadtests.bench.processes import Seconds, is_housekeeping, used
from loadtests.bench.tables import markdown
from loadtests.bench.work import Work

STREAMS = 16
SHORT = Work("short", STREAMS, 320, 2, mixed=True, slo=TINY_SLO)
LONG = Work("long", STREAMS, 32, 256, mixed=True, slo=TINY_SLO)
console = Console(stderr=True)


def measure(home: Path, base: str, *, rounds: int) -> dict[str, Any]:
    """`rounds` turns of each load for ours and the bare server, in turn. Medians are taken apart."""
    turns: dict[tuple[str, str], list[Seconds]] = defaultdict(list)
    with published(home, base, ADAPTERS) as adapters, started(home, base, adapters, ()) as servers:
        for number in range(rounds + 1):
            for batch, work in ((2 * number, SHORT), (2 * number + 1, LONG)):
                for one in servers:
                    cpu_s = _turn(one, work, batch)
                    if number:  # the first warms up
                        turns[one.name, work.name].append(cpu_s)
            console.print(f"round {number} of {rounds}" if number else "warm")
        names = [one.name for one in servers]
    return {
        "base": base, "streams": STREAMS, "rounds": rounds, "adapters": ADAPTERS,
        "answers": {work.name: {"requests": work.requests, "tokens": work.tokens} for work in (SHORT, LONG)},
        "servers": {name: apart(turns[name, SHORT.name], turns[name, LONG.name]) for name in names},
    }  # fmt: skip


def _turn(one: Running, work: Work, batch: int) -> Seconds:
    requests = requests_of(one.server, work, batch)
    time.sleep(QUIET_S)
    before = one.family.moment()
    answers = run(lambda: closed(one.server.url, requests, STREAMS)).answers
    cpu_s = used(before, one.family.moment())
    if failed := [answer for answer in answers if not answer.ok]:
        raise RuntimeError(f"{one.name}: {len(failed)} of {len(answers)} failed: {failed[0].error}")
    return cpu_s


def apart(short: list[Seconds], long: list[Seconds]) -> dict[str, dict[str, float]]:
    """By process: CPU µs a token and ms a request, from the medians of the turns."""
    tokens, requests = SHORT.requests * SHORT.tokens, SHORT.requests
    tokens_long, requests_long = LONG.requests * LONG.tokens, LONG.requests
    determinant = tokens * requests_long - tokens_long * requests
    told = {}
    for role in sorted({role for turn in short + long for role in turn}):
        one, other = (statistics.median(turn.get(role, 0.0) for turn in turns) for turns in (short, long))
        told[role] = {
            "token_us": round(1e6 * (one * requests_long - other * requests) / determinant, 1),
            "request_ms": round(1e3 * (tokens * other - tokens_long * one) / determinant, 2),
        }
    return told


def table(told: dict[str, Any]) -> str:
    """Without Ray's housekeeping, which a request does not pass through."""
    rows = [
        [server, role, f"{cost['token_us']:.0f}", f"{cost['request_ms']:.2f}"]
        for server, by_role in told["servers"].items()
        for role, cost in sorted(by_role.items(), key=lambda item: -item[1]["request_ms"])
        if not is_housekeeping(role) and max(cost["token_us"], 100 * cost["request_ms"]) >= 1
    ]
    return markdown(["server", "process", "CPU a token, µs", "CPU a request, ms"], rows)
