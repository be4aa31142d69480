"""Reads vLLM's counters of this process from its Prometheus registry."""

from prometheus_client import REGISTRY

from serve.engine.protocol import Load

# AsyncLLM registers many metrics in the process-wide registry. Only these are read.
_PROMPT_TOKENS, _COMPLETION_TOKENS = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_KV_USED, _PREEMPTIONS = "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total"
_PREFIX_QUERIES, _PREFIX_HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
READ = (
    *(_PROMPT_TOKENS, _COMPLETION_TOKENS, _RUNNING, _WAITING),
    *(_KV_USED, _PREEMPTIONS, _PREFIX_QUERIES, _PREFIX_HITS),
)


def read_counters() -> tuple[int, int, int, Load]:
    """Returns prompt and completion tokens since the start, requests in the batch, and vLLM's load."""
    sums = dict.fromkeys(READ, 0.0)
    for metric in REGISTRY.restricted_registry(READ).collect():
        for sample in metric.samples:
            sums[sample.name] += sample.value
    load = Load(
        waiting=int(sums[_WAITING]),
        kv_used=sums[_KV_USED],
        preemptions=int(sums[_PREEMPTIONS]),
        prefix_queries=int(sums[_PREFIX_QUERIES]),
        prefix_hits=int(sums[_PREFIX_HITS]),
    )
    return int(sums[_PROMPT_TOKENS]), int(sums[_COMPLETION_TOKENS]), int(sums[_RUNNING]), load
