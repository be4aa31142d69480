"""POST /v1/chat/completions — platform.openai.com/docs/api-reference/chat."""

from collections.abc import Iterable

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.answers import Json, answer
from serve.api.context import Ctx, Inference
from serve.api.wire import ChatCompletionRequest, parse
from serve.engine.base import Delta
from serve.generation import Call, Generation

router = APIRouter()


@router.post("/v1/chat/completions")
async def create(request: Request, who: Inference, ctx: Ctx) -> Response:
    body = parse(ChatCompletionRequest, await request.body())
    call = Call(
        request_id=request.state.request_id,
        model=body.model,
        prompt=body.prompt(ctx.limits),
        sampling=body.sampling(ctx.limits),
        length_param=body.length_param,
    )
    return await answer(
        request,
        lambda: ctx.gateway.generate(who, call),
        ChatShape(),
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )


class ChatShape:
    """chat.completion and chat.completion.chunk objects."""

    def opening(self, generation: Generation) -> Iterable[Json]:
        for index in range(generation.call.sampling.n):
            delta = {"role": "assistant", "content": ""}
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, delta: Delta) -> Json:
        content = {"content": delta.text} if delta.text else {}
        return {
            "index": delta.index,
            "delta": content,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }

    def whole(self, index: int, text: str, finish_reason: str | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def envelope(self, generation: Generation, choices: list[Json], *, streamed: bool) -> Json:
        return {
            "id": "chatcmpl-" + generation.call.request_id.removeprefix("req_"),
            "object": "chat.completion.chunk" if streamed else "chat.completion",
            "created": int(generation.created_at.timestamp()),
            "model": generation.model.name,
            "choices": choices,
        }
