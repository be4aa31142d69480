"""POST /v1/messages: the body into a Call, the generation into a message or its events."""

from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from serve.api.connection import EventStream, dumps, start, unless_gone
from serve.api.context import Ctx, Inference
from serve.api.document import DESCRIPTIONS
from serve.api.errors import anthropic_body_of
from serve.api.messages.blocks import Blocks
from serve.api.messages.wire import MessagesRequest
from serve.api.objects import generation_responses, json_body
from serve.api.once import answer_once
from serve.api.wire import parse
from serve.billing.pricing import Tokens
from serve.call import Call
from serve.errors import BespokeError
from serve.generation import Generation

router = APIRouter()

Json = dict[str, Any]


class TextContent(BaseModel):
    type: Literal["text"]
    text: str


class ToolUseContent(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(BaseModel):
    """`input_tokens` are those that were not found in the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextContent | ToolUseContent]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class AnthropicEvent(BaseModel):
    """One of Anthropic's typed events; what else it holds depends on its type."""

    type: str


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: Literal["error"]
    error: AnthropicErrorDetail


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
    call = Call(
        request_id=request.state.request_id,
        model=asked.model,
        prompt=asked.prompt(ctx.limits),
        sampling=asked.sampling(ctx.limits),
        length_param="max_tokens",
        toolbox=asked.toolbox(ctx.limits),
        reasoning_effort=asked.reasoning_effort,
        whole=not asked.stream,
    )
    if call.whole:
        response = await answer_once(request, ctx, who, call, whole)
    else:
        generation = await unless_gone(request, start(request, ctx, who, call))
        response = EventStream(generation, events(generation))
    response.headers["request-id"] = call.request_id  # as Anthropic's clients look for it
    return response


def whole(generation: Generation) -> Json:
    """The message of a generation that has gathered its answer."""
    assert generation.answer is not None
    blocks = Blocks(_id(generation))
    blocks.whole(generation.answer.choices[0])
    return _message(generation, blocks.content) | blocks.end


async def events(generation: Generation) -> AsyncIterator[bytes]:
    """The message's events — docs.anthropic.com/en/docs/build-with-claude/streaming."""
    blocks = Blocks(_id(generation))
    yield _event({"type": "message_start", "message": _message(generation, [])})
    try:
        async for batch in generation:
            yield b"".join(_event(one) for delta in batch for one in blocks.take(delta))
    except BespokeError as error:
        yield _event(anthropic_body_of(error))
        return
    closing = b"".join(map(_event, blocks.stop()))
    closing += _event({"type": "message_delta", "delta": blocks.end, "usage": usage(generation.tokens)})
    yield closing + _event({"type": "message_stop"})


def usage(tokens: Tokens) -> Json:
    """Cached prompt tokens are counted apart, and nobody pays to write the cache."""
    return {
        "input_tokens": tokens.prompt - tokens.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": tokens.cached,
        "output_tokens": tokens.completion,
    }


def _message(generation: Generation, content: list[Json]) -> Json:
    return {
        "id": _id(generation),
        "type": "message",
        "role": "assistant",
        "model": generation.model.name,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage(generation.tokens),
    }


def _id(generation: Generation) -> str:
    return "msg_" + generation.call.request_id.removeprefix("req_")


def _event(body: Json) -> bytes:
    return b"event: " + str(body["type"]).encode() + b"\ndata: " + dumps(body) + b"\n\n"
