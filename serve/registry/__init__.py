"""Registers models: bases, adapters, their versions and aliases."""
