"""The HTTP edge: wire formats, one module per resource, one error renderer."""
