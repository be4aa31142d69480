"""Connects gateways to engines: the protocol between them, its client, the transport, and vLLM behind it."""
