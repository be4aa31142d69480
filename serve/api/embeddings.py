"""POST /v1/embeddings — platform.openai.com/docs/api-reference/embeddings."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.bodies import read_body
from serve.api.dependencies import Ctx, DirectRoute, InferencePrincipal
from serve.api.schemas import EmbeddingList, errors, json_body
from serve.api.streaming import answer_complete
from serve.formats.embeddings import EmbeddingFormat, EmbeddingRequest, request_of
from serve.formats.response_format import complete_body
from serve.formats.sampling import parse
from serve.inference.request import InferenceRequest

router = APIRouter(route_class=DirectRoute)


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingList,
    responses=errors(400, 401, 403, 404, 409, 413, 429, 500, 503),
    openapi_extra=json_body(EmbeddingRequest),
)
async def create(request: Request, principal: InferencePrincipal, ctx: Ctx) -> Response:
    """Makes a vector of each input. Nothing is cut in silence: an input that is too long is a 400."""

    def read(raw: bytes) -> InferenceRequest:
        return request_of(parse(EmbeddingRequest, raw), request.state.request_id, ctx.limits)

    inference_request = await read_body(request, read)
    return await answer_complete(
        request, ctx, principal, inference_request, lambda result: complete_body(result, EmbeddingFormat())
    )
