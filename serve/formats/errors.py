"""Maps each error type to an HTTP status and to the error bodies of OpenAI's and Anthropic's APIs.

This table is the only such mapping; serve/api/errors.py sends what is written here.
OpenAI: platform.openai.com/docs/guides/error-codes, {"error": {"message", "type", "param", "code"}}.
"""

import json
from collections.abc import Mapping
from typing import Any

from serve import errors

# The order does not matter: the look-up walks each error's own class hierarchy.
STATUS: dict[type[errors.BespokeError], tuple[int, str, str | None]] = {
    errors.InvalidRequest: (400, "invalid_request_error", "invalid_value"),
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
    errors.ItemNotFound: (404, "invalid_request_error", None),
    errors.IdempotencyConflict: (409, "invalid_request_error", "idempotency_key_in_use"),
    errors.InsufficientCredit: (429, "insufficient_quota", "insufficient_quota"),
    errors.RequestQuarantined: (422, "invalid_request_error", "request_quarantined"),
    errors.RateLimited: (429, "requests", "rate_limit_exceeded"),
    errors.NotBillable: (429, "insufficient_quota", "billing_not_active"),
    errors.Unavailable: (503, "server_error", "service_unavailable"),
    errors.ClientGone: (499, "invalid_request_error", "client_closed_request"),
    errors.EngineFailed: (500, "server_error", "engine_failed"),
    errors.AlreadyExists: (409, "invalid_request_error", "already_exists"),
    errors.UnknownRecord: (404, "invalid_request_error", "not_found"),
    errors.RegistryError: (409, "invalid_request_error", "conflict"),
    errors.Conflict: (409, "invalid_request_error", "conflict"),
    errors.OperatorError: (500, "server_error", "internal_error"),
    errors.BespokeError: (500, "server_error", "internal_error"),
}


def status_of(error: errors.BespokeError) -> tuple[int, str, str | None]:
    """(HTTP status, OpenAI's type, OpenAI's code) of the nearest class in STATUS."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def body_of(error: errors.BespokeError) -> dict[str, Any]:
    """The body in OpenAI's format; an SSE error event carries the same."""
    status, kind, code = status_of(error)
    param = None
    if isinstance(error, errors.InvalidRequest):
        param, code = error.param, error.code or code
    elif isinstance(error, errors.ModelNotFound):
        param = "model"
    elif isinstance(error, errors.ItemNotFound):
        param = "input"
    elif isinstance(error, errors.RateLimited) and error.what == "tokens":
        kind = "tokens"
    hidden = type(error) is errors.BespokeError or (isinstance(error, errors.OperatorError) and status == 500)
    message = "The server had an error while processing your request." if hidden else error.message
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def validation_text(detail: Mapping[str, Any]) -> str:
    """The message of one of pydantic's errors, without the Python exception that it puts before ours."""
    return str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")


def kind_of(error: errors.BespokeError) -> tuple[str, str]:
    """OpenAI's (type, code) of an error, for the metrics."""
    detail = body_of(error)["error"]
    return detail["type"], detail["code"] or "none"


def anthropic_body_of(error: errors.BespokeError) -> dict[str, Any]:
    """The body in Anthropic's format; the message names the wrong field.

    docs.anthropic.com/en/api/errors. Statuses stay ours: Anthropic's clients treat 503 like 529.
    """
    status, _, _ = status_of(error)
    detail = body_of(error)["error"]
    message, param = detail["message"], detail["param"]
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


def sse_event(error: errors.BespokeError) -> bytes:
    """An error after the first byte: the status is already sent, so the error travels as an event."""
    return b"data: " + json.dumps(body_of(error)).encode() + b"\n\n"
