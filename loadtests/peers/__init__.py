"""Other servers beside which ours is measured; docs/peers.md says how each is run and what it leaves out."""
