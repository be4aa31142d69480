"""POST /v1/messages: Anthropic's Messages API over the same gateway — docs.anthropic.com/en/api/messages."""

from serve.api.messages.routes import router

__all__ = ["router"]
