"""POST /v1/chat/completions — platform.openai.com/docs/api-reference/chat."""

from collections.abc import Iterable

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.answer import Choice
from serve.api.answers import answer
from serve.api.connection import Json
from serve.api.context import Ctx, Inference
from serve.api.conversation import ChatCompletionRequest
from serve.api.direct import Direct
from serve.api.objects import ChatCompletion, ChatCompletionChunk, generation_responses, json_body
from serve.api.wire import Limits, parse
from serve.call import Call
from serve.engine.base import Delta, TokenLogprob, ToolCall
from serve.generation import Generation

router = APIRouter(route_class=Direct)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=generation_responses(ChatCompletion, ChatCompletionChunk),
    openapi_extra=json_body(ChatCompletionRequest),
)
async def create(request: Request, who: Inference, ctx: Ctx) -> Response:
    body = parse(ChatCompletionRequest, await request.body())
    call = call_of(body, request.state.request_id, ctx.limits)
    return await answer(
        request, ctx, who, call, ChatShape(), stream=bool(body.stream), include_usage=body.include_usage
    )


def call_of(body: ChatCompletionRequest, request_id: str, limits: Limits) -> Call:
    """Raises InvalidRequest for what is beyond the installation's bounds."""
    return Call(
        request_id=request_id,
        model=body.model,
        prompt=body.prompt(limits),
        sampling=body.sampling(limits),
        length_param=body.length_param,
        toolbox=body.toolbox(limits),
        reasoning_effort=body.reasoning_effort,
        whole=not body.stream,
    )


class ChatShape:
    """chat.completion and chat.completion.chunk objects."""

    def opening(self, generation: Generation) -> Iterable[Json]:
        for index in range(generation.call.choices):
            delta = {"role": "assistant", "content": ""}
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, delta: Delta) -> Json:
        fields: Json = {}
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.text:
            fields["content"] = delta.text
        if delta.tool_calls:
            fields["tool_calls"] = [_piece(call) for call in delta.tool_calls]
        return {
            "index": delta.index,
            "delta": fields,
            "logprobs": _logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def whole(self, choice: Choice, generation: Generation) -> Json:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.tool_calls
        ]
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if calls:
            message |= {"content": choice.text or None, "tool_calls": calls}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        return {
            "index": choice.index,
            "message": message,
            "logprobs": _logprobs(choice.logprobs) if generation.call.sampling.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }

    def envelope(self, generation: Generation, choices: list[Json], *, streamed: bool) -> Json:
        return {
            "id": "chatcmpl-" + generation.call.request_id.removeprefix("req_"),
            "object": "chat.completion.chunk" if streamed else "chat.completion",
            "created": int(generation.created_at.timestamp()),
            "model": generation.model.name,
            "choices": choices,
        }


def _piece(call: ToolCall) -> Json:
    function: Json = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name} | function,
    }


def _logprobs(tokens: Iterable[TokenLogprob]) -> Json | None:
    content = [
        _entry(one.token, one.logprob or 0.0) | {"top_logprobs": [_entry(*other) for other in one.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None} if content else None


def _entry(token: str, logprob: float) -> Json:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}
