"""Routes of the Responses API: create a response; read, delete or continue a stored one.

platform.openai.com/docs/api-reference/responses.
"""

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from serve.api.bodies import read_body
from serve.api.dependencies import Context, Ctx, InferencePrincipal
from serve.api.schemas import errors, generation_responses, json_body
from serve.api.streaming import EventStream, answer_complete, cancel_on_disconnect, count, start
from serve.client_data.stored_responses import ResponseCommitHook, StoredResponses
from serve.errors import InvalidRequest, ResponseNotFound
from serve.formats.bounds import bound
from serve.formats.response_format import dumps
from serve.formats.responses.builder import ResponseBuilder
from serve.formats.responses.events import events
from serve.formats.responses.items import Ids, input_items, messages, response_of
from serve.formats.responses.objects import (
    DeletedResponse,
    InputItemList,
    InputTokenCount,
    ResponseEvent,
    ResponseObject,
)
from serve.formats.responses.request import ResponsesRequest
from serve.formats.sampling import parse
from serve.inference.request import GenerationResult, InferenceRequest
from serve.tenants import Principal

router = APIRouter()

IGNORED_TOOLS = "x-bespoke-ignored-tools"

Json = dict[str, Any]


@router.post(
    "/v1/responses",
    response_model=ResponseObject,
    responses=generation_responses(ResponseObject, ResponseEvent),
    openapi_extra=json_body(ResponsesRequest),
)
async def create(request: Request, principal: InferencePrincipal, ctx: Ctx) -> Response:
    body = await read_body(request, partial(parse, ResponsesRequest))
    request_id: str = request.state.request_id
    turn = await _turn(ctx, principal, body, request_id)
    builder = ResponseBuilder(body, request_id, turn.new_items, turn.context)
    responses = StoredResponses(ctx.store)
    commit_hook = ResponseCommitHook(
        responses,
        principal.tenant,
        lambda result: builder.to_store(builder.complete(result, stored=True)),
    )
    inference_request = turn.request
    if inference_request.collect and body.stores:
        inference_request = replace(inference_request, commit_hook=commit_hook)

    def render(result: GenerationResult) -> Json:
        return commit_hook.stored.body if commit_hook.stored else builder.complete(result, stored=False)

    if inference_request.collect:
        response = await answer_complete(request, ctx, principal, inference_request, render)
    else:
        generation = await cancel_on_disconnect(request, start(request, ctx, principal, inference_request))
        stream = events(generation, builder, responses if body.stores else None, principal.tenant)
        response = EventStream(generation, stream)
    if body.ignored_tools:
        response.headers[IGNORED_TOOLS] = ", ".join(body.ignored_tools)
    return response


@router.post(
    "/v1/responses/input_tokens",
    response_model=InputTokenCount,
    responses=errors(400, 401, 403, 404, 413, 429, 503),
    openapi_extra=json_body(ResponsesRequest),
)
async def count_input_tokens(request: Request, principal: InferencePrincipal, ctx: Ctx) -> Response:
    """The `input_tokens` that a response to this body would be billed for. It is free."""
    body = await read_body(request, partial(parse, ResponsesRequest))
    turn = await _turn(ctx, principal, body, request.state.request_id)
    tokens = await count(request, ctx, principal, turn.request)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": tokens})


@router.get(
    "/v1/responses/{response_id}",
    response_model=ResponseObject,
    responses=errors(400, 401, 403, 404, 429, 503),
)
async def show(response_id: str, principal: InferencePrincipal, ctx: Ctx, stream: bool = False) -> Response:
    if stream:
        raise InvalidRequest("A stored response is not streamed.", "stream", "unsupported_parameter")
    stored = await asyncio.to_thread(_responses(ctx).find, principal.tenant, response_id, at=_now(ctx))
    return _unvalidated(stored.body)


@router.delete(
    "/v1/responses/{response_id}",
    response_model=DeletedResponse,
    responses=errors(401, 403, 404, 429, 503),
)
async def delete(response_id: str, principal: InferencePrincipal, ctx: Ctx) -> Json:
    await asyncio.to_thread(_responses(ctx).delete, principal.tenant, response_id, at=_now(ctx))
    return {"id": response_id, "object": "response", "deleted": True}


@router.post(
    "/v1/responses/{response_id}/cancel",
    response_model=ResponseObject,
    responses=errors(400, 401, 403, 404, 429, 503),
)
async def cancel(response_id: str, principal: InferencePrincipal, ctx: Ctx) -> Json:
    """Refuses: only a response in the background could be cancelled, and none runs there."""
    await asyncio.to_thread(_responses(ctx).find, principal.tenant, response_id, at=_now(ctx))
    raise InvalidRequest("Only responses that run in the background can be cancelled.")


@router.get(
    "/v1/responses/{response_id}/input_items",
    response_model=InputItemList,
    responses=errors(400, 401, 403, 404, 429, 503),
)
async def list_input_items(
    response_id: str,
    principal: InferencePrincipal,
    ctx: Ctx,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The items that the response answered: its own input, and the earlier turns before it."""
    stored = await asyncio.to_thread(_responses(ctx).find, principal.tenant, response_id, at=_now(ctx))
    items = stored.context if order == "asc" else stored.context[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequest("'after' is not the id of an item of this list.", "after", "invalid_value")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return _unvalidated(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )


def _unvalidated(body: Json) -> Response:
    """Answers stored JSON unchecked: an older version may have stored it in another form."""
    return Response(dumps(body), media_type="application/json")


@dataclass(frozen=True, slots=True)
class _Turn:
    """Holds one turn: the items before it, its own items, and what the model is asked."""

    context: list[Json]
    new_items: list[Json]
    request: InferenceRequest


async def _turn(ctx: Context, principal: Principal, body: ResponsesRequest, request_id: str) -> _Turn:
    """Raises InvalidRequest, and ItemNotFound for a reference to an item that is not stored."""
    context = await _context(ctx, principal, body.previous_response_id)
    stored = await _referenced(ctx, principal, body.references)
    new_items = input_items(body.input, Ids(request_id), stored, context)
    conversation = [*context, *new_items]
    bound("input", len(conversation), ctx.limits.messages, "items, those of earlier turns included")
    request = InferenceRequest(
        request_id=request_id,
        model=body.model,
        prompt=messages(conversation, body.instructions),
        sampling=body.sampling(ctx.limits),
        toolbox=body.toolbox(ctx.limits),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        collect=not body.stream,
        completion_tokens_asked=body.max_output_tokens,
    )
    return _Turn(context, new_items, request)


async def _referenced(ctx: Context, principal: Principal, item_ids: list[str]) -> dict[str, Json]:
    """The tenant's stored items of these ids; those that are there."""
    bound("input", len(item_ids), ctx.limits.messages, "items")
    of_response = {item_id: response_id for item_id in item_ids if (response_id := response_of(item_id))}
    if not of_response:
        return {}
    return await asyncio.to_thread(_responses(ctx).items, principal.tenant, of_response, at=_now(ctx))


async def _context(ctx: Context, principal: Principal, previous: str | None) -> list[Json]:
    """The conversation up to the response `previous`. Raises InvalidRequest if that is not stored."""
    if previous is None:
        return []
    try:
        stored = await asyncio.to_thread(_responses(ctx).find, principal.tenant, previous, at=_now(ctx))
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
