"""POST /v1/completions — platform.openai.com/docs/api-reference/completions."""

from collections.abc import Iterable

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.answers import Json, answer
from serve.api.context import Ctx, Inference
from serve.api.wire import CompletionRequest, parse
from serve.engine.base import Delta
from serve.generation import Call, Generation

router = APIRouter()


@router.post("/v1/completions")
async def create(request: Request, who: Inference, ctx: Ctx) -> Response:
    body = parse(CompletionRequest, await request.body())
    call = Call(
        request_id=request.state.request_id,
        model=body.model,
        prompt=body.prompt,
        sampling=body.sampling(ctx.limits),
        length_param="max_tokens",
    )
    return await answer(
        request,
        lambda: ctx.gateway.generate(who, call),
        CompletionShape(),
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )


class CompletionShape:
    """text_completion objects; a streamed one has the same shape as a whole one."""

    def opening(self, generation: Generation) -> Iterable[Json]:
        return ()

    def choice(self, delta: Delta) -> Json:
        return self.whole(delta.index, delta.text, delta.finish_reason)

    def whole(self, index: int, text: str, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def envelope(self, generation: Generation, choices: list[Json], *, streamed: bool) -> Json:
        return {
            "id": "cmpl-" + generation.call.request_id.removeprefix("req_"),
            "object": "text_completion",
            "created": int(generation.created_at.timestamp()),
            "model": generation.model.name,
            "choices": choices,
        }
