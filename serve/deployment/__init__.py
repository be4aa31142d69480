"""Composition roots: settings in, running processes out. The only package that imports ray."""
