"""POST /v1/responses, and what was stored of earlier ones."""

import asyncio
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from serve.api.dependencies import Context, Ctx, Inference
from serve.api.schemas import errors, generation_responses, json_body
from serve.api.streaming import EventStream, answer_once, cancel_on_disconnect, start
from serve.client_data.stored_responses import ResponseCommitHook, StoredResponses
from serve.errors import InvalidRequest, ResponseNotFound
from serve.formats.bounds import bound
from serve.formats.responses.events import events
from serve.formats.responses.items import Ids, input_items, messages
from serve.formats.responses.objects import (
    DeletedResponse,
    InputItemList,
    ResponseEvent,
    ResponseObject,
)
from serve.formats.responses.request import ResponsesRequest
from serve.formats.responses.shape import ResponseObjectFormat
from serve.formats.sampling import parse
from serve.formats.shape import dumps
from serve.inference.request import GenerationResult, InferenceRequest
from serve.tenants import Principal

router = APIRouter()

Json = dict[str, Any]


@router.post(
    "/v1/responses",
    response_model=ResponseObject,
    responses=generation_responses(ResponseObject, ResponseEvent),
    openapi_extra=json_body(ResponsesRequest),
)
async def create(request: Request, who: Inference, ctx: Ctx) -> Response:
    asked = parse(ResponsesRequest, await request.body())
    request_id: str = request.state.request_id
    context = await _context(ctx, who, asked.previous_response_id)
    own = input_items(asked.input, Ids(request_id))
    conversation = [*context, *own]
    bound("input", len(conversation), ctx.limits.messages, "items, those of earlier turns included")
    shape = ResponseObjectFormat(asked, request_id, own, context)
    responses = StoredResponses(ctx.store)
    commit_hook = ResponseCommitHook(
        responses,
        who.tenant,
        lambda result: shape.to_store(shape.whole(result, stored=True)),
    )
    whole = not asked.stream
    call = InferenceRequest(
        request_id=request_id,
        model=asked.model,
        prompt=messages(conversation, asked.instructions),
        sampling=asked.sampling(ctx.limits),
        length_param="max_output_tokens",
        toolbox=asked.toolbox(ctx.limits),
        reasoning_effort=asked.reasoning.effort if asked.reasoning else None,
        collect=whole,
        commit_hook=commit_hook if whole and asked.keeps else None,
    )

    def render(result: GenerationResult) -> Json:
        return commit_hook.stored.body if commit_hook.stored else shape.whole(result, stored=False)

    if whole:
        return await answer_once(request, ctx, who, call, render)
    generation = await cancel_on_disconnect(request, start(request, ctx, who, call))
    stream = events(generation, shape, responses if asked.keeps else None, who.tenant)
    return EventStream(generation, stream)


@router.get(
    "/v1/responses/{response_id}",
    response_model=ResponseObject,
    responses=errors(400, 401, 403, 404, 429, 503),
)
async def show(response_id: str, who: Inference, ctx: Ctx, stream: bool = False) -> Response:
    if stream:
        raise InvalidRequest("A stored response is not streamed.", "stream", "unsupported_parameter")
    stored = await asyncio.to_thread(_responses(ctx).find, who.tenant, response_id, at=_now(ctx))
    return _as_it_is(stored.body)


@router.delete(
    "/v1/responses/{response_id}",
    response_model=DeletedResponse,
    responses=errors(401, 403, 404, 429, 503),
)
async def delete(response_id: str, who: Inference, ctx: Ctx) -> Json:
    await asyncio.to_thread(_responses(ctx).delete, who.tenant, response_id, at=_now(ctx))
    return {"id": response_id, "object": "response", "deleted": True}


@router.post(
    "/v1/responses/{response_id}/cancel",
    response_model=ResponseObject,
    responses=errors(400, 401, 403, 404, 429, 503),
)
async def cancel(response_id: str, who: Inference, ctx: Ctx) -> Json:
    """Refuses: only a response in the background could be cancelled, and there is none."""
    await asyncio.to_thread(_responses(ctx).find, who.tenant, response_id, at=_now(ctx))
    raise InvalidRequest("Only responses that run in the background can be cancelled.")


@router.get(
    "/v1/responses/{response_id}/input_items",
    response_model=InputItemList,
    responses=errors(400, 401, 403, 404, 429, 503),
)
async def list_input_items(
    response_id: str,
    who: Inference,
    ctx: Ctx,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What the response answered: its own input, and before it the turns that it continued."""
    stored = await asyncio.to_thread(_responses(ctx).find, who.tenant, response_id, at=_now(ctx))
    items = stored.context if order == "asc" else stored.context[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequest("'after' is not the id of an item of this list.", "after", "invalid_value")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return _as_it_is(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )


def _as_it_is(body: Json) -> Response:
    """What an older version stored need not fit what this one would answer, so it is not validated."""
    return Response(dumps(body), media_type="application/json")


async def _context(ctx: Context, who: Principal, previous: str | None) -> list[Json]:
    """The conversation so far. Raises InvalidRequest if the response that it ends with is not there."""
    if previous is None:
        return []
    try:
        stored = await asyncio.to_thread(_responses(ctx).find, who.tenant, previous, at=_now(ctx))
    except ResponseNotFound:
        raise InvalidRequest(
            f"Previous response with id '{previous}' not found.",
            "previous_response_id",
            "previous_response_not_found",
        ) from None
    return stored.conversation


def _responses(ctx: Context) -> StoredResponses:
    return StoredResponses(ctx.store)


def _now(ctx: Context) -> datetime:
    return ctx.gateway.context.now()
