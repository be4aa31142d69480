"""What the OpenAPI document says of every route: how errors look, and how a caller is known."""

from typing import Any

from fastapi import Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field

DESCRIPTIONS = {
    400: "The request breaks a rule; `param` names the field.",
    401: "No key, or not a live one.",
    403: "The key lacks the scope, or its tenant is suspended.",
    404: "There is no such thing, or it is another tenant's.",
    408: "The body did not arrive in time.",
    409: "It exists already, or its state forbids what was asked.",
    413: "The body is too large.",
    415: "The body is compressed in a way that is not understood.",
    429: "A limit is reached, or the credit does not cover the request.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "Try again later; `Retry-After` says when.",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str | None = Field(description="The rule that it breaks, for programs.")


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers errors with `statuses`.

    The default, which has the same shape, keeps FastAPI from declaring a 422 that we never send.
    """
    known: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": DESCRIPTIONS[status]} for status in statuses
    }
    return known | {"default": {"model": ErrorBody, "description": "Any other error."}}


# For the document only: the key itself is read by `serve.api.context`.
KEY_REQUIRED = Security(HTTPBearer(auto_error=False, scheme_name="key", description="An API key."))
