"""Streams a response as typed, numbered server-sent events.

platform.openai.com/docs/api-reference/responses-streaming.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any

from serve.client_data.stored_responses import StoredResponses
from serve.errors import BespokeError
from serve.formats.response_format import dumps
from serve.formats.responses.builder import ResponseBuilder
from serve.inference.generation import Generation

log = logging.getLogger(__name__)


async def events(
    generation: Generation, builder: ResponseBuilder, responses: StoredResponses | None, tenant: str
) -> AsyncIterator[bytes]:
    """The events of one response, in one chunk per engine step.

    responses: where the response is stored before its last event is sent; None if it is not stored.
    """
    numbers = itertools.count()

    def event(kind: str, body: dict[str, Any]) -> bytes:
        data = dumps({"type": kind, "sequence_number": next(numbers)} | body)
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    output, started = builder.output(), {"response": builder.in_progress(generation.result)}
    yield event("response.created", started) + event("response.in_progress", started)
    try:
        async for batch in generation:
            yield b"".join(event(body["type"], body) for delta in batch for body in output.take(delta))
    except BespokeError as error:
        yield event("response.failed", {"response": builder.failed(generation.result, output, error)})
        return
    closing = b"".join(event(body["type"], body) for body in output.end())
    result = generation.result
    response = builder.ended(result, output, stored=responses is not None)
    if responses is not None:
        try:
            await asyncio.to_thread(
                responses.store,
                tenant,
                result.request.request_id,
                builder.to_store(response),
                at=result.created_at,
            )
        except Exception:
            # The answer is complete and billed, so it is not a failure: the client learns it is not stored.
            log.exception("response of %s is not stored", result.request.request_id)
            response = response | {"store": False}
    kind = "response.completed" if output.complete else "response.incomplete"
    yield closing + event(kind, {"response": response})
