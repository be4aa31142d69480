"""/v1/responses — platform.openai.com/docs/api-reference/responses."""

from serve.api.responses.routes import router

__all__ = ["router"]
