"""/v1/responses — platform.openai.com/docs/api-reference/responses."""

__all__ = ["router"]
