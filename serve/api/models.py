"""GET /v1/models and /v1/models/{id} — platform.openai.com/docs/api-reference/models."""

import asyncio

from fastapi import APIRouter

from serve.api import schemas
from serve.api.dependencies import Ctx, InferencePrincipal
from serve.api.schemas import ModelList, errors
from serve.errors import ModelNotFound
from serve.formats.response_format import Json
from serve.registry.versions import Model

router = APIRouter()


@router.get("/v1/models", response_model=ModelList, responses=errors(401, 403, 429, 503))
async def index(principal: InferencePrincipal, ctx: Ctx) -> Json:
    models = await asyncio.to_thread(ctx.registry.models, principal.tenant)
    visible = [model for model in models if principal.may_use(model.name)]
    return {"object": "list", "data": [_wire(model, principal.tenant) for model in visible]}


@router.get(
    "/v1/models/{name:path}",
    response_model=schemas.Model,
    responses=errors(401, 403, 404, 429, 503),
)
async def show(name: str, principal: InferencePrincipal, ctx: Ctx) -> Json:
    def resolve() -> Model:
        with ctx.store.read() as connection:
            return ctx.registry.resolve(connection, principal.tenant, name)

    if len(name) > 160 or not principal.may_use(name):
        raise ModelNotFound(name[:160])
    return _wire(await asyncio.to_thread(resolve), principal.tenant)


def _wire(model: Model, tenant: str) -> Json:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at.timestamp()) if model.created_at else 0,
        "owned_by": tenant if model.adapter else "bespoke",
    }
