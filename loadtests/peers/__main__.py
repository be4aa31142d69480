"""Starts one peer, sends it one streamed request for each model, and ends it.

.venv/bin/python -m loadtests.peers litellm --home .bespoke --base tiny
"""

import argparse
import os
from pathlib import Path

from rich.console import Console

from loadtests.bench.connection import encode_request
from loadtests.bench.load_generator import closed_loop, run_on_uvloop
from loadtests.bench.servers import published_adapters
from loadtests.bench.workload import body, end_tokens
from loadtests.peers.peer_list import PEERS, running_peer

TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("BESPOKE_HOME", ".bespoke")))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapters", type=int, default=2, help="random adapters, asked after the base")
    options = parser.parse_args()
    console = Console()
    ends = end_tokens(options.home / "bases" / options.base)
    with (
        published_adapters(options.home, options.base, options.adapters) as adapters,
        running_peer(options.name, options.home, options.base, adapters) as server,
    ):
        console.print(f"{server.name}: process {server.root_pid}. {server.leaves_out}")
        for model in server.models:
            fields = body(model, "Tell me about the sea.", tokens=TOKENS, end_tokens=ends)
            requests = [encode_request(server.url, server.key, fields)]
            (result,) = run_on_uvloop(lambda: closed_loop(server.url, requests, 1)).results  # noqa: B023
            if not result.ok:
                raise SystemExit(f"{server.name}: {result.error or result.status}")
            console.print(
                f"{model}: TTFT {result.ttft_s * 1000:.1f} ms, {result.prompt_tokens} prompt "
                f"and {result.completion_tokens} completion tokens"
            )
            if result.completion_tokens != TOKENS:
                raise SystemExit(f"{server.name} counts {result.completion_tokens} of {TOKENS} tokens")


if __name__ == "__main__":
    main()
