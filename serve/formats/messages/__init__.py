"""Translates Anthropic's Messages API: request, content blocks, message."""
