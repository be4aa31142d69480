"""Packs, probes and schedules an engine replica's adapters, and follows their desired state."""
