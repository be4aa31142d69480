"""The one place that turns an error into HTTP: type → status, OpenAI's `type` and `code`.

Shape: platform.openai.com/docs/guides/error-codes — {"error": {"message", "type", "param", "code"}}.
"""

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serve import errors

log = logging.getLogger(__name__)

# Most specific class first is not needed: the look-up walks each error's own class hierarchy.
STATUS: dict[type[errors.BespokeError], tuple[int, str, str | None]] = {
    errors.InvalidRequest: (400, "invalid_request_error", None),
    errors.BodyTooLarge: (413, "invalid_request_error", "request_too_large"),
    errors.Unauthenticated: (401, "invalid_request_error", "invalid_api_key"),
    errors.PermissionDenied: (403, "invalid_request_error", "insufficient_permissions"),
    errors.NotFound: (404, "invalid_request_error", "not_found"),
    errors.MethodNotAllowed: (405, "invalid_request_error", "method_not_allowed"),
    errors.ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    errors.InsufficientCredit: (429, "insufficient_quota", "insufficient_quota"),
    errors.NotBillable: (429, "insufficient_quota", "billing_not_active"),
    errors.Unavailable: (503, "server_error", "service_unavailable"),
    errors.ClientGone: (499, "invalid_request_error", "client_closed_request"),
    errors.EngineFailed: (500, "server_error", "engine_failed"),
    errors.OperatorError: (500, "server_error", "internal_error"),
    errors.BespokeError: (500, "server_error", "internal_error"),
}


def status_of(error: errors.BespokeError) -> tuple[int, str, str | None]:
    """(HTTP status, OpenAI type, OpenAI code) of the nearest class that STATUS names."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def body_of(error: errors.BespokeError) -> dict[str, Any]:
    """The OpenAI-shaped body; also what an SSE error event carries."""
    _, kind, code = status_of(error)
    param = None
    if isinstance(error, errors.InvalidRequest):
        param, code = error.param, error.code or code
    elif isinstance(error, errors.ModelNotFound):
        param = "model"
    hidden = isinstance(error, errors.OperatorError) or type(error) is errors.BespokeError
    message = "The server had an error while processing your request." if hidden else error.message
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def render(error: errors.BespokeError) -> Response:
    status, _, _ = status_of(error)
    headers = {}
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error), status, headers=headers)


def sse_event(error: errors.BespokeError) -> bytes:
    """An error after the first byte: the status is sent already, so it travels as an event."""
    return b"data: " + json.dumps(body_of(error)).encode() + b"\n\n"


def install(app: FastAPI) -> None:
    @app.exception_handler(errors.BespokeError)
    async def bespoke_error(_request: Request, error: errors.BespokeError) -> Response:
        return render(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            known: errors.BespokeError = errors.MethodNotAllowed(
                f"Method {request.method} is not allowed here."
            )
        elif error.status_code == 404:
            known = errors.NotFound(f"Invalid URL ({request.method} {request.url.path}).")
        else:
            known = errors.InvalidRequest(str(error.detail))
        response = render(known)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The path only: bodies hold prompts and headers hold keys.
        log.error("unexpected error at %s %s", request.method, request.url.path, exc_info=error)
        return render(errors.BespokeError())
