"""Batches: files of requests that run within a day."""
