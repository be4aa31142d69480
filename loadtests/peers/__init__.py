"""Runs the servers that ours is compared with; docs/peers.md says how each is run and what it leaves out."""
