"""The OpenAPI document at /openapi.json: FastAPI's, completed.

FastAPI sees neither the schemas of bodies that routes read themselves nor what every request passes through:
the edge, the intake and the door, which refuse requests before a route is asked.
"""

from typing import Any

from fastapi import FastAPI

from serve.api.schemas import BODIES, errors

_ANY, _WITH_KEY, _WITH_BODY = (431, 500), (401, 403, 503), (400, 408, 413, 415)
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}


def install(app: FastAPI) -> None:
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
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
    responses = operation["responses"]
    # There only to keep FastAPI from declaring a 422, which nobody gets.
    responses.pop("default", None)
    responses.pop("422", None)
    statuses = [*_ANY]
    statuses += _WITH_KEY if operation.get("security") else ()
    statuses += _WITH_BODY if "requestBody" in operation else ()
    for status, response in errors(*statuses).items():
        if status != "default":
            description = response["description"]
            responses.setdefault(str(status), {"description": description, "content": _ERROR})
