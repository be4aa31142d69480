"""Runs vLLM's own load generator (`vllm.benchmarks.serve`) on our prompts, to check ours against it.

It runs in a child process. The child reads a JSON file with an order for each server and writes a file of
results for each.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtests.peers.engine import ROOT
from loadtests.peers.server import Server

TIMEOUT_S = 300
REPORTED = ("completed", "failed", "total_input_tokens", "total_output_tokens", "output_throughput",
        "request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")  # fmt: skip


@dataclass(frozen=True)
class Order:
    """Says what the child process is to send to one server."""

    name: str
    url: str
    key: str
    model: str
    prompts: list[str]
    tokens: int
    streams: int
    extra: dict[str, Any]  # body fields that its own command line does not know


def make_order(
    server: Server, prompts: Sequence[str], tokens: int, streams: int, extra: dict[str, Any]
) -> Order:
    """Asks for the base alone: vLLM's generator draws adapters at random."""
    return Order(server.name, server.url, server.key, server.model, list(prompts), tokens, streams, extra)


def run_orders(orders: Sequence[Order], tokenizer: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Returns what vLLM's generator reports of each server, by the server's name."""
    with tempfile.TemporaryDirectory(prefix="bespoke-bench-") as scratch:
        orders_path = Path(scratch, "orders.json")
        orders_path.write_text(json.dumps([asdict(order) for order in orders]))
        command = [
            sys.executable,
            "-m",
            "loadtests.bench.vllm_generator",
            str(orders_path),
            str(tokenizer),
            str(seed),
        ]
        environment = os.environ | {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        completed = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if completed.returncode:
            raise RuntimeError(f"vllm.benchmarks.serve failed:\n{completed.stderr[-3000:]}")
        return {
            order.name: json.loads(Path(scratch, f"{number}.json").read_text())
            for number, order in enumerate(orders)
        }


def main() -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as benchmark
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    orders_path, tokenizer, seed = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for number, fields in enumerate(json.loads(orders_path.read_text())):
        order = Order(**fields)
        prompts = orders_path.with_name(f"{number}.jsonl")
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in order.prompts))
        result = orders_path.with_name(f"{number}.json")
        arguments = [
            "--backend",
            "openai-chat",
            "--base-url",
            order.url,
            "--endpoint",
            "/v1/chat/completions",
        ]
        arguments += ["--model", order.model, "--served-model-name", order.model, "--tokenizer", tokenizer]
        arguments += ["--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template"]
        arguments += ["--custom-output-len", str(order.tokens), "--num-prompts", str(len(order.prompts))]
        arguments += ["--max-concurrency", str(order.streams), "--seed", seed, "--temperature", "0"]
        arguments += [
            "--header",
            f"Authorization=Bearer {order.key}",
            "--extra-body",
            json.dumps(order.extra),
        ]
        arguments += [
            "--save-result",
            "--result-dir",
            str(orders_path.parent),
            "--result-filename",
            result.name,
        ]
        with contextlib.redirect_stdout(sys.stderr):
            benchmark(parser.parse_args([*arguments, "--disable-tqdm"]))
        report = json.loads(result.read_text())
        result.write_text(json.dumps({name: report[name] for name in REPORTED if name in report}))


if __name__ == "__main__":
    main()
