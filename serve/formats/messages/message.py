"""Writes the answer to `POST /v1/messages`: one message object, or its stream of events."""

from collections.abc import AsyncIterator
from typing import Any

from serve.billing.pricing.plans import Tokens
from serve.errors import BespokeError
from serve.formats.errors import anthropic_body_of
from serve.formats.messages.blocks import Blocks
from serve.formats.response_format import dumps
from serve.inference.generation import Generation
from serve.inference.request import GenerationResult

Json = dict[str, Any]


def complete_message(result: GenerationResult) -> Json:
    """The message of a request that collects its answer."""
    assert result.choices
    blocks = Blocks(_id(result))
    blocks.take_complete(result.choices[0])
    return _message(result, blocks.content) | blocks.ending


async def events(generation: Generation) -> AsyncIterator[bytes]:
    """The message's server-sent events — docs.anthropic.com/en/docs/build-with-claude/streaming."""
    blocks = Blocks(_id(generation.result))
    yield _event({"type": "message_start", "message": _message(generation.result, [])})
    try:
        async for batch in generation:
            yield b"".join(_event(event) for delta in batch for event in blocks.take(delta))
    except BespokeError as error:
        yield _event(anthropic_body_of(error))
        return
    closing = b"".join(map(_event, blocks.stop()))
    closing += _event({"type": "message_delta", "delta": blocks.ending, "usage": usage(generation.tokens)})
    yield closing + _event({"type": "message_stop"})


def usage(tokens: Tokens) -> Json:
    """Anthropic's `usage` object: cached prompt tokens are counted apart; writing the cache is free."""
    return {
        "input_tokens": tokens.prompt - tokens.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": tokens.cached,
        "output_tokens": tokens.completion,
    }


def _message(result: GenerationResult, content: list[Json]) -> Json:
    return {
        "id": _id(result),
        "type": "message",
        "role": "assistant",
        "model": result.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage(result.tokens),
    }


def _id(result: GenerationResult) -> str:
    return "msg_" + result.request.request_id.removeprefix("req_")


def _event(body: Json) -> bytes:
    return b"event: " + str(body["type"]).encode() + b"\ndata: " + dumps(body) + b"\n\n"
