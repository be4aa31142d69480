"""Runs a private Ray on loopback with ray.serve.llm's application until SIGTERM; `ray_llm` starts it."""

import json
import logging
import signal
import sys
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.schema import LoggingConfig


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    # Set before Ray sets its own: the processes end in good order at any time.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ray.init(
        address="local",
        num_cpus=16,  # Ray's bookkeeping, not cores: a replica and the router would not fit into two
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=order["scratch"],
        runtime_env={"worker_process_setup_hook": "loadtests.peers.loopback.keep_on_loopback"},
    )
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    try:
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host="127.0.0.1", port=order["port"]),
            logging_config=quiet,
        )
        ray_serve.run(build_openai_app({"llm_configs": [configuration(order)]}), logging_config=quiet)
        signal.pause()
    finally:
        ray.shutdown()


def configuration(order: dict[str, Any]) -> LLMConfig:
    # Without ray.serve.llm's own `lora_config`, which takes adapters only from object stores.
    modules = [{"name": name, "path": path} for name, path in order["adapters"].items()]
    return LLMConfig(
        model_loading_config={"model_id": order["model_id"], "model_source": order["model_source"]},
        accelerator_config={"kind": "cpu"},
        engine_kwargs=order["engine_kwargs"] | ({"lora_modules": modules} if modules else {}),
    )


if __name__ == "__main__":
    main()
