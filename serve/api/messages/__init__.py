"""POST /v1/messages: Anthropic's Messages API over the same gateway — docs.anthropic.com/en/api/messages."""

__all__ = ["router"]
