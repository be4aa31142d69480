"""Runs one inference request, from admission to settlement."""
