"""Webhooks: the outbox of events, and their signed delivery."""
