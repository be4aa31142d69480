"""Sends errors as HTTP responses: status and body from `serve.formats.errors`, plus headers.

Headers say when to retry, or which credentials are needed.
"""

import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serve import errors
from serve.formats.errors import anthropic_body_of, body_of, status_of, validation_text

# Routes whose errors have another API's format than OpenAI's, with all that is below them.
BODY_BY_PATH = {"/v1/messages": anthropic_body_of}

# OpenAI's and Anthropic's clients retry these refusals, unless `x-should-retry` is false. They are final
# where the error names no time: an empty account, a used-up budget, a record that exists.
RETRIED_REFUSALS = frozenset({409, 429})

_ROUTE_NAME = re.compile("[a-z]+(?:[_-][a-z]+)*")
# Routes whose ids we make, with digits; a tenant's or a model's name may look like a route's.
_WITH_IDS = ("/v1/batches/", "/v1/files/", "/v1/responses/")


def render(error: errors.BespokeError, path: str = "") -> Response:
    """The answer to a request for `path` that ended in `error`."""
    return ErrorResponse(error, path)


class ErrorResponse(JSONResponse):
    """Answers an error, and leaves it in the scope's state as `error` for `middleware.RequestMiddleware`."""

    def __init__(self, error: errors.BespokeError, path: str) -> None:
        status, _, _ = status_of(error)
        super().__init__(_body_format(path)(error), status, headers=_headers(error))
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["error"] = self._error
        await super().__call__(scope, receive, send)


def _body_format(path: str) -> Callable[[errors.BespokeError], dict[str, Any]]:
    formats = (body for root, body in BODY_BY_PATH.items() if path == root or path.startswith(f"{root}/"))
    return next(formats, body_of)


def _headers(error: errors.BespokeError) -> dict[str, str]:
    status, _, _ = status_of(error)
    retry_after_s: int | None = getattr(error, "retry_after_s", None)
    headers = {}
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    elif status in RETRIED_REFUSALS:
        headers["x-should-retry"] = "false"
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.RateLimited) and retry_after_s is not None:
        headers |= _rate_limit_headers(error)
    return headers


def _rate_limit_headers(error: errors.RateLimited) -> dict[str, str]:
    headers = {}
    if error.what in ("requests", "tokens"):
        headers[f"x-ratelimit-limit-{error.what}"] = str(error.limit)
        headers[f"x-ratelimit-remaining-{error.what}"] = str(max(error.limit - error.used, 0))
        headers[f"x-ratelimit-reset-{error.what}"] = f"{error.retry_after_s}s"
    return headers


def invalid_request(error: RequestValidationError) -> errors.InvalidRequest:
    """The first of FastAPI's validation errors as our error. It does not repeat the client's input."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return errors.InvalidRequest("The body is not valid JSON.", None, "invalid_value")
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    text = f"{param or 'The body'}: {validation_text(first)}"
    return errors.InvalidRequest(text, param, "invalid_value")


def _names_a_route(request: Request) -> bool:
    """True if a route's name stands where a route with another method has an id: POST /v1/responses/compact.

    There is no such route: 405 would mislead.
    """
    return request.url.path.startswith(_WITH_IDS) and any(
        _ROUTE_NAME.fullmatch(str(value)) for value in request.path_params.values()
    )


def install(app: FastAPI) -> None:
    """Register the handlers. `middleware.RequestMiddleware` answers any other exception, which is a bug."""

    @app.exception_handler(errors.BespokeError)
    async def bespoke_error(request: Request, error: errors.BespokeError) -> Response:
        return render(error, request.url.path)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return render(errors.ClientGone(), request.url.path)  # the client left while sending its body

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return render(invalid_request(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, errors.BespokeError):  # FastAPI wraps what reading a body raises
            return render(error.__cause__, request.url.path)
        no_route = error.status_code == 404 or (error.status_code == 405 and _names_a_route(request))
        if no_route:
            failure: errors.BespokeError = errors.NotFound(
                f"Invalid URL ({request.method} {request.url.path})."
            )
        elif error.status_code == 405:
            failure = errors.MethodNotAllowed(f"Method {request.method} is not allowed here.")
        else:
            failure = errors.InvalidRequest(str(error.detail))
        response = render(failure, request.url.path)
        if not no_route:
            response.headers.update(error.headers or {})
        return response
