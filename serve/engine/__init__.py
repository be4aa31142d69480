"""The engine seam: typed requests in, typed deltas out (`base`), and its two sides (`vllm`, `remote`)."""
