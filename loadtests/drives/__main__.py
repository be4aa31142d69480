"""Runs one suite against a gateway: `python -m loadtests.drives langchain|lm-eval|vllm-bench`.

    .venv/bin/python -m loadtests.drives langchain --home .bespoke --base tiny
    .venv/bin/python -m loadtests.drives lm-eval --url https://… --key bsk-… --model acme/support

Without --url it starts a service of its own on the base. The suite's exit status is the command's.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loadtests.drives.suites import SUITES, Gateway
from loadtests.load.__main__ import running_service
from loadtests.load.service_under_test import read_service
from loadtests.peers.environment import isolated_variables

TIMEOUT_S = 1800


@contextlib.contextmanager
def gateway(options: argparse.Namespace) -> Iterator[Gateway]:
    """Yields the gateway that the options name, or one that is started for this run."""
    tokenizer = options.home / "bases" / options.base
    if options.url:
        yield Gateway(options.url.rstrip("/"), options.key, options.model, tokenizer)
        return
    with running_service(options.home / "bases", options.base, adapters=0) as described:
        service = read_service(described)
        model = service.models[0]
        yield Gateway(service.url, model.key, model.name, tokenizer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("BESPOKE_HOME", ".bespoke")))
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--url", help="of a gateway that runs already; with --key and --model")
    parser.add_argument("--key")
    parser.add_argument("--model")
    options, more = parser.parse_known_args()
    if options.url and not (options.key and options.model):
        parser.error("--url needs --key and --model")
    with gateway(options) as target, tempfile.TemporaryDirectory(prefix="bespoke-drive-") as scratch:
        command, variables = SUITES[options.suite](target, Path(scratch))
        isolated = isolated_variables(Path(scratch)) | variables
        done = subprocess.run([*command, *more], env=isolated, timeout=TIMEOUT_S, check=False)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
