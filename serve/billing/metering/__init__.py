"""Metering: usage events, their sums, and questions about them."""
