"""POST /v1/chat/completions — platform.openai.com/docs/api-reference/chat."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.bodies import read_body
from serve.api.dependencies import Ctx, DirectRoute, InferencePrincipal
from serve.api.schemas import ChatCompletion, ChatCompletionChunk, generation_responses, json_body
from serve.api.streaming import answer
from serve.formats.chat import ChatCompletionRequest, ChatFormat, request_of
from serve.formats.sampling import parse
from serve.inference.request import InferenceRequest

router = APIRouter(route_class=DirectRoute)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=generation_responses(ChatCompletion, ChatCompletionChunk),
    openapi_extra=json_body(ChatCompletionRequest),
)
async def create(request: Request, principal: InferencePrincipal, ctx: Ctx) -> Response:
    def read(raw: bytes) -> tuple[ChatCompletionRequest, InferenceRequest]:
        body = parse(ChatCompletionRequest, raw)
        return body, request_of(body, request.state.request_id, ctx.limits)

    body, inference_request = await read_body(request, read)
    return await answer(
        request,
        ctx,
        principal,
        inference_request,
        ChatFormat(),
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )
