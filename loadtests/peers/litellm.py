"""Runs LiteLLM's proxy 1.91.1 in front of another server. docs/peers.md says why no other version."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtests.peers.environment import environment, isolated_variables
from loadtests.peers.process import free_port, running
from loadtests.peers.server import Server

LEAVES_OUT = (
    "Run without its database: no keys, tenants, budgets or durable metering; "
    "it forwards to one engine and knows nothing of adapters but their names."
)
# Without these LiteLLM fetches tables from the network when it is imported.
VARIABLES = {
    "LITELLM_MODE": "PRODUCTION",  # reads no .env file
    "LITELLM_LOG": "ERROR",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_POLICY_TEMPLATES": "True",
    "DISABLE_ADMIN_UI": "True",
}


@contextmanager
def litellm(upstream: Server) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        port, config = free_port(), Path(scratch, "config.json")
        config.write_text(json.dumps(configuration(upstream)))  # LiteLLM reads YAML; JSON is YAML
        command = [str(environment("litellm") / "litellm"), "--config", str(config), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--num_workers", "1", "--telemetry", "False"]
        variables, url = isolated_variables(Path(scratch)) | VARIABLES, f"http://127.0.0.1:{port}"
        with running(
            "litellm", command, variables, directory=Path(scratch), url=url, model=upstream.model
        ) as pid:
            yield Server("litellm", url, "none", upstream.model, pid, LEAVES_OUT, upstream.adapters)


def configuration(upstream: Server) -> dict[str, object]:
    """Returns LiteLLM's configuration: one route per model name; `hosted_vllm` is an OpenAI-like server."""
    return {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {
                    "model": f"hosted_vllm/{name}",
                    "api_base": f"{upstream.url}/v1",
                    "api_key": upstream.key,
                },
            }
            for name in (upstream.model, *upstream.adapters)
        ],
        "litellm_settings": {"telemetry": False, "num_retries": 0},
    }
