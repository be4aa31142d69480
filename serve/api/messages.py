"""POST /v1/messages — Anthropic's Messages API, docs.anthropic.com/en/api/messages."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.bodies import read_body
from serve.api.dependencies import Ctx, InferencePrincipal
from serve.api.schemas import DESCRIPTIONS, generation_responses, json_body
from serve.api.streaming import EventStream, answer_complete, cancel_on_disconnect, start
from serve.formats.messages.message import complete_message, events
from serve.formats.messages.objects import AnthropicError, AnthropicEvent, AnthropicMessage
from serve.formats.messages.request import MessagesRequest
from serve.formats.sampling import parse
from serve.inference.request import InferenceRequest

router = APIRouter()


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": AnthropicError, "description": DESCRIPTIONS[status]}
    for status in (400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 503)
}


@router.post(
    "/v1/messages",
    response_model=AnthropicMessage,
    responses=generation_responses(AnthropicMessage, AnthropicEvent) | ERRORS,
    openapi_extra=json_body(MessagesRequest),
)
async def create(request: Request, principal: InferencePrincipal, ctx: Ctx) -> Response:
    def read(raw: bytes) -> InferenceRequest:
        body = parse(MessagesRequest, raw)
        return InferenceRequest(
            request_id=request.state.request_id,
            model=body.model,
            prompt=body.prompt(ctx.limits),
            sampling=body.sampling(ctx.limits),
            length_param="max_tokens",
            toolbox=body.toolbox(ctx.limits),
            reasoning_effort=body.reasoning_effort,
            collect=not body.stream,
        )

    inference_request = await read_body(request, read)
    if inference_request.collect:
        response = await answer_complete(request, ctx, principal, inference_request, complete_message)
    else:
        generation = await cancel_on_disconnect(request, start(request, ctx, principal, inference_request))
        response = EventStream(generation, events(generation))
    response.headers["request-id"] = inference_request.request_id  # the header that Anthropic's clients read
    return response
