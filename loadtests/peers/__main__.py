"""Starts one peer, asks it one question as a stream for each model, and ends it.

.venv/bin/python -m loadtests.peers litellm --home .bespoke --base tiny
"""

import argparse
import os
import tempfile
from pathlib import Path

from rich.console import Console

from loadtests.peers.ask import ask
from loadtests.peers.catalogue import NAMES, peer
from loadtests.synthetic import publish_random

TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("BESPOKE_HOME", ".bespoke")))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapters", type=int, default=2, help="random ones, asked after the base")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        base_dir, adapters_dir = options.home / "bases" / options.base, Path(scratch)
        adapters = {
            name: publish_random(base_dir, adapters_dir, tenant="bench", name=name, seed=seed)
            for seed, name in enumerate(f"a{number}" for number in range(options.adapters))
        }
        with peer(options.name, options.home, options.base, adapters) as server:
            console.print(f"{server.name}: process {server.root_pid}. {server.leaves_out}")
            for model in (server.model, *server.adapters):
                answer = ask(server, model, "Tell me about the sea.", tokens=TOKENS)
                console.print(
                    f"{model}: TTFT {answer.ttft_s * 1000:.1f} ms, {answer.prompt_tokens} prompt "
                    f"and {answer.completion_tokens} completion tokens, {answer.text!r}"
                )
                if answer.completion_tokens != TOKENS:
                    raise SystemExit(f"{server.name} counts {answer.completion_tokens} of {TOKENS} tokens")


if __name__ == "__main__":
    main()
