"""Data kept for clients: files, stored responses, idempotent answers."""
