"""POST /v1/messages — Anthropic's Messages API, docs.anthropic.com/en/api/messages."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from serve.api.bodies import read_body
from serve.api.dependencies import Ctx, InferencePrincipal
from serve.api.schemas import DESCRIPTIONS, generation_responses, json_body
from serve.api.streaming import EventStream, answer_complete, cancel_on_disconnect, count, start
from serve.formats.messages.message import complete_message, events
from serve.formats.messages.objects import (
    AnthropicError,
    AnthropicEvent,
    AnthropicMessage,
    AnthropicTokenCount,
)
from serve.formats.messages.request import MessagesPrompt, MessagesRequest, request_of
from serve.formats.sampling import parse
from serve.inference.request import InferenceRequest

router = APIRouter()


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": AnthropicError, "description": DESCRIPTIONS[status]}
    for status in (400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 503)
}
NO_OTHER: dict[int | str, dict[str, Any]] = {
    "default": {"model": AnthropicError, "description": "Any other error."}
}


@router.post(
    "/v1/messages",
    response_model=AnthropicMessage,
    responses=generation_responses(AnthropicMessage, AnthropicEvent) | ERRORS,
    openapi_extra=json_body(MessagesRequest),
)
async def create(request: Request, principal: InferencePrincipal, ctx: Ctx) -> Response:
    inference_request = await read_body(request, _reader(MessagesRequest, request, ctx))
    if inference_request.collect:
        response = await answer_complete(request, ctx, principal, inference_request, complete_message)
    else:
        generation = await cancel_on_disconnect(request, start(request, ctx, principal, inference_request))
        response = EventStream(generation, events(generation))
    response.headers["request-id"] = inference_request.request_id  # the header that Anthropic's clients read
    return response


@router.post(
    "/v1/messages/count_tokens",
    response_model=AnthropicTokenCount,
    responses=ERRORS | NO_OTHER,
    openapi_extra=json_body(MessagesPrompt),
)
async def count_tokens(request: Request, principal: InferencePrincipal, ctx: Ctx) -> Response:
    """The input tokens that a message of this body would be billed for, cached ones included. It is free."""
    inference_request = await read_body(request, _reader(MessagesPrompt, request, ctx))
    tokens = await count(request, ctx, principal, inference_request)
    return JSONResponse({"input_tokens": tokens}, headers={"request-id": inference_request.request_id})


def _reader(model: type[MessagesPrompt], request: Request, ctx: Ctx) -> Callable[[bytes], InferenceRequest]:
    return lambda raw: request_of(parse(model, raw), request.state.request_id, ctx.limits)
