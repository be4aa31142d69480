"""Imports base models, quantizes them, measures the loss of quality, and publishes what passes its gate."""
