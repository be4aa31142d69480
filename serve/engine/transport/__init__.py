"""Carries requests and events between gateways and engine replicas; README.md explains the protocol."""
