"""Training of LoRA adapters on a CPU: the loop, its schedule, and the cache of frozen layers' outputs."""
