"""The registry of models: bases, adapters, their versions and aliases."""
