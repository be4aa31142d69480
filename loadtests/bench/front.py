"""The gateway beside vLLM's own server, on the same base with the same engine flags.

    .venv/bin/python -m loadtests.bench.front --home .bespoke --pairs 5 --streams 1 16

Both servers run all the time and take turns (A B A B …), so that a noisy moment hits both; medians
over the pairs. Ours authenticates, holds, meters and settles each request; theirs does none of that.
Prints a table and ends with one JSON object.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from loadtests.bench.machine import machine
from serve.billing.ledger import Ledger
from serve.billing.pricing import Prices, read_plan
from serve.db import Store
from serve.lora_files import target_suffixes
from serve.settings import Settings, load_settings
from serve.tenants import Tenants, server_secret

ROOT = Path(__file__).parents[2]
MAX_TOKENS = 64
TOPICS = (
    "the sea",
    "a mountain",
    "a small town",
    "a long journey",
    "a garden",
    "an old clock",
    "winter",
    "a train",
)


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    key: str
    model: str


@dataclass(frozen=True)
class Sample:
    """One burst: `streams` requests at once."""

    tokens: int
    wall_s: float
    ttft_s: list[float]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


async def burst(server: Server, streams: int, seed: int) -> Sample:
    ttft_s: list[float] = []

    async def one(client: httpx.AsyncClient, number: int) -> int:
        prompt = f"Write a story number {seed + number} about {TOPICS[number % len(TOPICS)]}."
        body = {
            "model": server.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started_s, first, tokens = time.perf_counter(), True, 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if first and event["choices"] and event["choices"][0]["delta"].get("content"):
                    ttft_s.append(time.perf_counter() - started_s)
                    first = False
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        return tokens

    headers = {"Authorization": f"Bearer {server.key}"}
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=300, limits=limits) as client:
        started_s = time.perf_counter()
        counts = await asyncio.gather(*(one(client, number) for number in range(streams)))
        return Sample(sum(counts), time.perf_counter() - started_s, ttft_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def ours(home: Path, base: str) -> Iterator[Server]:
    from serve.deployment import Service

    with tempfile.TemporaryDirectory(prefix="bespoke-bench-") as scratch:
        Path(scratch, "bases").symlink_to((home / "bases").resolve())
        settings = load_settings(
            ROOT / "configs" / "serve" / "cpu.yaml", home=Path(scratch), port=free_port(), bases=[base]
        )
        key = customer(settings)
        with Service(settings) as service:
            yield Server("bespoke", service.url, key, base)


def customer(settings: Settings) -> str:
    store, now = Store(settings.store_url), datetime.now(UTC)
    store.migrate()
    tenants, prices = Tenants(store, server_secret(settings.home)), Prices(store)
    tenants.create("bench", at=now)
    Ledger(store).open_account("bench", 10**15)
    prices.publish(read_plan(ROOT / "configs" / "prices" / "standard.yaml"), at=now)
    prices.subscribe("bench", "standard", at=now)
    _, secret = tenants.create_key("bench", at=now)
    store.close()
    return secret


@contextmanager
def bare(home: Path, base: str) -> Iterator[Server]:
    """vLLM's OpenAI server with our engine's flags."""
    engine, port = load_settings(ROOT / "configs" / "serve" / "cpu.yaml").engine, free_port()
    flags = {
        "model": str((home / "bases" / base).resolve()),
        "served-model-name": base,
        "host": "127.0.0.1",
        "port": port,
        "dtype": engine.dtype,
        "max-model-len": engine.max_model_len,
        "max-num-seqs": engine.max_num_seqs,
        "max-num-batched-tokens": engine.max_num_batched_tokens,
        "max-loras": engine.max_loras,
        "max-cpu-loras": engine.max_cpu_loras,
        "max-lora-rank": engine.max_lora_rank,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    targets = target_suffixes((home / "bases" / base).resolve())
    command += ["--lora-target-modules", *targets, "--enable-prefix-caching"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_cache_gib),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_healthy(url, process)
            yield Server("vllm", url, "none", base)
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(30)
            _, alive = psutil.wait_procs(family, timeout=10)
            for straggler in alive:
                straggler.kill()


def _wait_healthy(url: str, process: "subprocess.Popen[bytes]", timeout_s: float = 300) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM's server ended with status {process.returncode}")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise TimeoutError("vLLM's server did not come up")


def memory_mb(root: psutil.Process) -> dict[str, int]:
    """Resident memory by process, in MB."""
    by_name: dict[str, int] = {}
    for process in root.children(recursive=True):
        try:
            name = " ".join(process.cmdline()[:1])[:60] or process.name()
            by_name[name] = by_name.get(name, 0) + process.memory_info().rss // 2**20
        except psutil.Error:
            continue
    return dict(sorted(by_name.items(), key=lambda item: -item[1])[:10])


def measure(servers: list[Server], streams: int, pairs: int) -> dict[str, dict[str, float]]:
    samples: dict[str, list[Sample]] = {server.name: [] for server in servers}
    for server in servers:
        asyncio.run(burst(server, streams, seed=0))  # warm-up
    for pair in range(1, pairs + 1):
        for server in servers:  # the same prompts for both, new ones in each pair
            samples[server.name].append(asyncio.run(burst(server, streams, seed=1000 * pair)))
    return {
        name: {
            "tokens_per_s": round(statistics.median(s.tokens_per_s for s in taken), 2),
            "ttft_p50_ms": round(statistics.median(t for s in taken for t in s.ttft_s) * 1000, 1),
            "tokens": sum(s.tokens for s in taken),
        }
        for name, taken in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("BESPOKE_HOME", ".bespoke")))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    report: dict[str, object] = {
        "base": options.base,
        "max_tokens": MAX_TOKENS,
        "pairs": options.pairs,
        **machine(),
    }
    table = Table("streams", "server", "tok/s (median)", "TTFT p50 ms", "tokens")
    with ours(options.home, options.base) as mine, bare(options.home, options.base) as theirs:
        for streams in options.streams:
            figures = measure([mine, theirs], streams, options.pairs)
            ratio = figures["bespoke"]["tokens_per_s"] / figures["vllm"]["tokens_per_s"]
            report[f"streams_{streams}"] = figures | {"ratio": round(ratio, 3)}
            for name, row in figures.items():
                table.add_row(str(streams), name, *(str(value) for value in row.values()))
        report["memory_mb"] = memory_mb(psutil.Process())
    console = Console()
    console.print(table)
    console.print_json(json.dumps(report))


if __name__ == "__main__":
    main()
