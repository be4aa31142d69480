"""Evaluation of adapters against their base: the metrics, and the gate that they must pass."""
