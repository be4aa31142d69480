"""Stores data for clients: files, responses, answers under idempotency keys."""
