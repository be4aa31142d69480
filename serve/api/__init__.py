"""Serves the HTTP API: one module per resource, and the middleware, dependencies and errors they share."""
