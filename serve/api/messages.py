"""POST /v1/messages: the body into a Call, the generation into a message or its events."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.dependencies import Ctx, Inference
from serve.api.schemas import DESCRIPTIONS, generation_responses, json_body
from serve.api.streaming import EventStream, answer_once, cancel_on_disconnect, start
from serve.formats.messages.message import events, whole
from serve.formats.messages.objects import AnthropicError, AnthropicEvent, AnthropicMessage
from serve.formats.messages.request import MessagesRequest
from serve.formats.sampling import parse
from serve.inference.request import InferenceRequest

router = APIRouter()


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": AnthropicError, "description": DESCRIPTIONS[status]}
    for status in (400, 401, 403, 404, 408, 409, 413, 429, 500, 503)
}


@router.post(
    "/v1/messages",
    response_model=AnthropicMessage,
    responses=generation_responses(AnthropicMessage, AnthropicEvent) | ERRORS,
    openapi_extra=json_body(MessagesRequest),
)
async def create(request: Request, who: Inference, ctx: Ctx) -> Response:
    asked = parse(MessagesRequest, await request.body())
    call = InferenceRequest(
        request_id=request.state.request_id,
        model=asked.model,
        prompt=asked.prompt(ctx.limits),
        sampling=asked.sampling(ctx.limits),
        length_param="max_tokens",
        toolbox=asked.toolbox(ctx.limits),
        reasoning_effort=asked.reasoning_effort,
        collect=not asked.stream,
    )
    if call.collect:
        response = await answer_once(request, ctx, who, call, whole)
    else:
        generation = await cancel_on_disconnect(request, start(request, ctx, who, call))
        response = EventStream(generation, events(generation))
    response.headers["request-id"] = call.request_id  # as Anthropic's clients look for it
    return response
