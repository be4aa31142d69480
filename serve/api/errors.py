"""The one place that turns an error into HTTP: type → status, OpenAI's `type` and `code`.

Shape: platform.openai.com/docs/guides/error-codes — {"error": {"message", "type", "param", "code"}}.
"""

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serve import errors

# Most specific class first is not needed: the look-up walks each error's own class hierarchy.
STATUS: dict[type[errors.BespokeError], tuple[int, str, str | None]] = {
    errors.InvalidRequest: (400, "invalid_request_error", None),
    errors.BodyTimeout: (408, "invalid_request_error", "request_timeout"),
    errors.HeadersTooLarge: (431, "invalid_request_error", "headers_too_large"),
    errors.UnsupportedEncoding: (415, "invalid_request_error", "unsupported_encoding"),
    errors.BodyTooLarge: (413, "invalid_request_error", "request_too_large"),
    errors.Unauthenticated: (401, "invalid_request_error", "invalid_api_key"),
    errors.PermissionDenied: (403, "invalid_request_error", "insufficient_permissions"),
    errors.TenantSuspended: (403, "invalid_request_error", "tenant_suspended"),
    errors.NotFound: (404, "invalid_request_error", "not_found"),
    errors.MethodNotAllowed: (405, "invalid_request_error", "method_not_allowed"),
    errors.ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    errors.ResponseNotFound: (404, "invalid_request_error", None),
    errors.IdempotencyConflict: (409, "invalid_request_error", "idempotency_key_in_use"),
    errors.InsufficientCredit: (429, "insufficient_quota", "insufficient_quota"),
    errors.RateLimited: (429, "requests", "rate_limit_exceeded"),
    errors.NotBillable: (429, "insufficient_quota", "billing_not_active"),
    errors.Unavailable: (503, "server_error", "service_unavailable"),
    errors.ClientGone: (499, "invalid_request_error", "client_closed_request"),
    errors.EngineFailed: (500, "server_error", "engine_failed"),
    errors.AlreadyExists: (409, "invalid_request_error", "already_exists"),
    errors.UnknownRecord: (404, "invalid_request_error", "not_found"),
    errors.CatalogueError: (409, "invalid_request_error", "conflict"),
    errors.Conflict: (409, "invalid_request_error", "conflict"),
    errors.OperatorError: (500, "server_error", "internal_error"),
    errors.BespokeError: (500, "server_error", "internal_error"),
}


def status_of(error: errors.BespokeError) -> tuple[int, str, str | None]:
    """(HTTP status, OpenAI type, OpenAI code) of the nearest class that STATUS names."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def body_of(error: errors.BespokeError) -> dict[str, Any]:
    """The OpenAI-shaped body; also what an SSE error event carries."""
    status, kind, code = status_of(error)
    param = None
    if isinstance(error, errors.InvalidRequest):
        param, code = error.param, error.code or code
    elif isinstance(error, errors.ModelNotFound):
        param = "model"
    elif isinstance(error, errors.RateLimited) and error.what == "tokens":
        kind = "tokens"
    hidden = type(error) is errors.BespokeError or (isinstance(error, errors.OperatorError) and status == 500)
    message = "The server had an error while processing your request." if hidden else error.message
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def kind_of(error: errors.BespokeError) -> tuple[str, str]:
    """OpenAI's (type, code) of an error; for the metrics."""
    told = body_of(error)["error"]
    return told["type"], told["code"] or "none"


def anthropic_body_of(error: errors.BespokeError) -> dict[str, Any]:
    """The same in the shape of Anthropic's API; the field that is wrong joins the message.

    docs.anthropic.com/en/api/errors. Statuses stay ours: their clients take a 503 as they take a 529.
    """
    status, _, _ = status_of(error)
    plain = body_of(error)["error"]
    message, param = plain["message"], plain["param"]
    unpaid = isinstance(error, errors.InsufficientCredit | errors.NotBillable)
    kind = "billing_error" if unpaid else ANTHROPIC_TYPES.get(status, "invalid_request_error")
    text = message if param is None or param in message else f"{param}: {message}"
    return {"type": "error", "error": {"type": kind, "message": text}}


ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
# Routes that answer errors in another API's shape.
DIALECTS = {"/v1/messages": anthropic_body_of}


class Refusal(JSONResponse):
    """An answer that leaves its error where `edge.py` looks for it: in the scope's state, as `refused`."""

    def __init__(self, error: errors.BespokeError, path: str) -> None:
        status, _, _ = status_of(error)
        super().__init__(DIALECTS.get(path, body_of)(error), status, headers=_headers(error))
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["refused"] = self._error
        await super().__call__(scope, receive, send)


def render(error: errors.BespokeError, path: str = "") -> Response:
    """The answer to a request for `path` that ended in `error`."""
    return Refusal(error, path)


def _headers(error: errors.BespokeError) -> dict[str, str]:
    """When to try again, where that is known."""
    match error:
        case errors.Unavailable():
            return {"Retry-After": str(error.retry_after_s)}
        case errors.IdempotencyConflict():
            return {"Retry-After": "1"}
        case errors.Unauthenticated():
            return {"WWW-Authenticate": "Bearer"}
        case errors.RateLimited():
            return _limits(error)
    return {}


def _limits(error: errors.RateLimited) -> dict[str, str]:
    if error.retry_after_s is None:
        return {"x-should-retry": "false"}  # OpenAI's clients heed it
    headers = {"Retry-After": str(error.retry_after_s)}
    if error.what in ("requests", "tokens"):
        headers[f"x-ratelimit-limit-{error.what}"] = str(error.limit)
        headers[f"x-ratelimit-remaining-{error.what}"] = str(max(error.limit - error.used, 0))
        headers[f"x-ratelimit-reset-{error.what}"] = f"{error.retry_after_s}s"
    return headers


def sse_event(error: errors.BespokeError) -> bytes:
    """An error after the first byte: the status is sent already, so it travels as an event."""
    return b"data: " + json.dumps(body_of(error)).encode() + b"\n\n"


def invalid_request(error: RequestValidationError) -> errors.InvalidRequest:
    """The first thing that FastAPI found wrong, in our words; what was sent is not repeated."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return errors.InvalidRequest("The body is not valid JSON.", None, "invalid_value")
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    text = f"{param}: {first['msg']}" if param else f"The body: {first['msg']}"
    return errors.InvalidRequest(text, param, "invalid_value")


def install(app: FastAPI) -> None:
    """What is not here is unexpected, and answered by `edge.py`."""

    @app.exception_handler(errors.BespokeError)
    async def bespoke_error(request: Request, error: errors.BespokeError) -> Response:
        return render(error, request.url.path)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return render(errors.ClientGone(), request.url.path)  # in the middle of its body

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return render(invalid_request(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, errors.BespokeError):  # FastAPI wraps what reading a body raises
            return render(error.__cause__, request.url.path)
        if error.status_code == 405:
            known: errors.BespokeError = errors.MethodNotAllowed(
                f"Method {request.method} is not allowed here."
            )
        elif error.status_code == 404:
            known = errors.NotFound(f"Invalid URL ({request.method} {request.url.path}).")
        else:
            known = errors.InvalidRequest(str(error.detail))
        response = render(known, request.url.path)
        response.headers.update(error.headers or {})
        return response
