"""Does an adapter do what an adapter must: change the base's answers, and leave none of it behind?

vLLM serves the base without a word where it finds no layer for an adapter's weights (vLLM issue 34186).
"""

import math

from finetune.errors import FinetuneError
from serve.engine.vllm.engine import VllmEngine
from serve.registry.versions import AdapterVersion

# What the same request's log-probabilities may differ by, in another batch or on another day.
NOISE = 1e-3
_RESTORED_MAX = 0.1


async def probe(engine: VllmEngine, adapter: AdapterVersion) -> str | None:
    """Why `adapter` may not be served, or None if it may. Raises EngineUnavailable."""
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
    change, rest = distance(before, adapted), distance(before, after)
    if change <= NOISE:
        return f"it changes nothing: log-probabilities differ by at most {change:.2g}"
    if rest > max(NOISE, min(change / 4, _RESTORED_MAX)):
        return f"the base is not itself again after unloading: log-probabilities differ by {rest:.2g}"
    return None


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference over the tokens that both list; infinite if they share none."""
    return max((abs(one[token] - other[token]) for token in one.keys() & other.keys()), default=math.inf)
