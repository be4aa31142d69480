"""Builds running processes from settings: the composition roots. The only package that imports ray."""
