"""Completes FastAPI's OpenAPI document at /openapi.json.

FastAPI sees neither the schemas of bodies that routes read themselves nor the refusals of middleware and
authentication, which come before a route.
"""

from typing import Any

from fastapi import FastAPI

from serve.api.schemas import BODIES, errors

_ANY, _WITH_KEY, _WITH_BODY = (431, 500), (401, 403, 503), (400, 408, 413, 415)
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}


def install(app: FastAPI) -> None:
    fastapi_document = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = fastapi_document()
            schemas = document["components"]["schemas"]
            if clash := [name for name, schema in BODIES.items() if schemas.get(name, schema) != schema]:
                raise ValueError(f"two models of one name: {', '.join(clash)}")
            schemas.update(BODIES)
            for operations in document["paths"].values():
                for operation in operations.values():
                    _complete(operation)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend it


def _complete(operation: dict[str, Any]) -> None:
    """Add the statuses that middleware and authentication answer."""
    responses = operation["responses"]
    # Only there to keep FastAPI from declaring a 422, which is never sent.
    responses.pop("default", None)
    responses.pop("422", None)
    statuses = [*_ANY]
    statuses += _WITH_KEY if operation.get("security") else ()
    statuses += _WITH_BODY if "requestBody" in operation else ()
    for status, response in errors(*statuses).items():
        if status != "default":
            description = response["description"]
            responses.setdefault(str(status), {"description": description, "content": _ERROR})
