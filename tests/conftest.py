"""Settings of the whole suite: the same examples in every run, and no deadline on a busy machine."""

import os

from hypothesis import HealthCheck, settings

# `serve.deployment` sets this before it imports ray; here a test that runs vLLM may import ray first.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
