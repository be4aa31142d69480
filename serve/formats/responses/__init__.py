"""Translates OpenAI's Responses API: request, items, response object, events."""
