"""The connection between a gateway and an engine replica, and its two ends."""
