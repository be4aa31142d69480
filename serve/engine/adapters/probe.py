"""Probes an adapter in the engine: it must change the base's answers, and leave no trace once it is unloaded.

vLLM silently serves the base where it finds no layer for an adapter's weights (vLLM issue 34186).
"""

import math

from finetune.errors import FinetuneError
from serve.engine.vllm.engine import VllmEngine
from serve.registry.versions import AdapterVersion

# How much the log-probabilities of first request may differ between two batches.
NOISE = 1e-3
_RESTORED_MAX = 0.1


async def probe(engine: VllmEngine, adapter: AdapterVersion) -> str | None:
    """Returns why `adapter` may not be served, or None if it may. Raises EngineUnavailable."""
    before = await engine.logprobs(None)
    try:
        adapted = await engine.logprobs(adapter)
    except (FinetuneError, OSError) as error:
        return f"its files are not those that were registered: {error}"
    finally:
        await engine.unload(adapter.id)
    after = await engine.logprobs(None)
    if not all(map(math.isfinite, adapted.values())):
        return "its answers are not finite numbers"
    change, residue = distance(before, adapted), distance(before, after)
    if change <= NOISE:
        return f"it changes nothing: log-probabilities differ by at most {change:.2g}"
    if residue > max(NOISE, min(change / 4, _RESTORED_MAX)):
        return f"the base is not itself again after unloading: log-probabilities differ by {residue:.2g}"
    return None


def distance(first: dict[int, float], second: dict[int, float]) -> float:
    """Returns the largest difference over the tokens that both list; infinite if they share none."""
    return max(
        (abs(first[token] - second[token]) for token in first.keys() & second.keys()), default=math.inf
    )
