"""POST /v1/completions — platform.openai.com/docs/api-reference/completions."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.bodies import read_body
from serve.api.dependencies import Ctx, DirectRoute, InferencePrincipal
from serve.api.schemas import TextCompletion, generation_responses, json_body
from serve.api.streaming import answer
from serve.formats.completions import CompletionFormat, CompletionRequest, request_of
from serve.formats.sampling import parse
from serve.inference.request import InferenceRequest

router = APIRouter(route_class=DirectRoute)


@router.post(
    "/v1/completions",
    response_model=TextCompletion,
    responses=generation_responses(TextCompletion, TextCompletion),
    openapi_extra=json_body(CompletionRequest),
)
async def create(request: Request, principal: InferencePrincipal, ctx: Ctx) -> Response:
    def read(raw: bytes) -> tuple[CompletionRequest, InferenceRequest]:
        body = parse(CompletionRequest, raw)
        return body, request_of(body, request.state.request_id, ctx.limits)

    body, inference_request = await read_body(request, read)
    return await answer(
        request,
        ctx,
        principal,
        inference_request,
        CompletionFormat(),
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )
