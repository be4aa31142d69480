"""POST /v1/embeddings: refuses, because the bases generate text and none makes embeddings.

A clear refusal is better than an unknown URL. platform.openai.com/docs/api-reference/embeddings.
"""

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from serve.api.bodies import read_body
from serve.api.dependencies import Ctx, InferencePrincipal
from serve.api.schemas import errors, json_body
from serve.errors import InvalidRequest, ModelNotFound
from serve.formats.sampling import parse
from serve.registry.versions import Model

router = APIRouter()


class EmbeddingRequest(BaseModel):
    model: str = Field(min_length=1, max_length=160)
    input: Any


@router.post(
    "/v1/embeddings",
    status_code=400,
    responses=errors(400, 401, 403, 404, 413, 503),
    openapi_extra=json_body(EmbeddingRequest),
)
async def create(request: Request, principal: InferencePrincipal, ctx: Ctx) -> None:
    """Raises ModelNotFound for a model that the caller cannot see, InvalidRequest for any other model."""
    body = await read_body(request, partial(parse, EmbeddingRequest))

    def resolve() -> Model:
        with ctx.store.read() as connection:
            return ctx.registry.resolve(connection, principal.tenant, body.model)

    if not principal.may_use(body.model):
        raise ModelNotFound(body.model)
    await asyncio.to_thread(resolve)
    raise InvalidRequest(
        f"The model '{body.model}' generates text and makes no embeddings.", "model", "unsupported_model"
    )
