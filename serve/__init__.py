"""The gateway: Ray Serve hosts vLLM replicas behind an OpenAI-style, metered HTTP API."""
