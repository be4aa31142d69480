"""GET /v1/models and /v1/models/{id} — platform.openai.com/docs/api-reference/models."""

import asyncio

from fastapi import APIRouter

from serve.adapters import Model
from serve.api.answers import Json
from serve.api.context import Ctx, Inference
from serve.errors import ModelNotFound

router = APIRouter()


@router.get("/v1/models")
async def index(who: Inference, ctx: Ctx) -> Json:
    models = await asyncio.to_thread(ctx.catalogue.models, who.tenant)
    return {"object": "list", "data": [_wire(model, who.tenant) for model in models]}


@router.get("/v1/models/{name:path}")
async def show(name: str, who: Inference, ctx: Ctx) -> Json:
    def resolve() -> Model:
        with ctx.store.read() as connection:
            return ctx.catalogue.resolve(connection, who.tenant, name)

    if len(name) > 160:
        raise ModelNotFound(name[:160])
    return _wire(await asyncio.to_thread(resolve), who.tenant)


def _wire(model: Model, tenant: str) -> Json:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at.timestamp()) if model.created_at else 0,
        "owned_by": tenant if model.adapter else "bespoke",
    }
