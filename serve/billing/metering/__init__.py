"""Metering: usage events, their sums, and queries on them."""
