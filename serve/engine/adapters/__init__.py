"""An engine replica's adapters: packed, probed, put into slots, brought to the desired state."""
