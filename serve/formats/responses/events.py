"""A streamed response: typed, numbered events.

platform.openai.com/docs/api-reference/responses-streaming.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any

from serve.client_data.stored_responses import StoredResponses
from serve.errors import BespokeError
from serve.formats.responses.shape import ResponseObjectFormat
from serve.formats.shape import dumps
from serve.inference.generation import Generation

log = logging.getLogger(__name__)


async def events(
    generation: Generation, shape: ResponseObjectFormat, responses: StoredResponses | None, tenant: str
) -> AsyncIterator[bytes]:
    """The events of one response, in as many pieces as the engine has steps.

    responses: where to store it, before its last event is sent; None if it is not to be stored.
    """
    numbers = itertools.count()

    def event(kind: str, body: dict[str, Any]) -> bytes:
        data = dumps({"type": kind, "sequence_number": next(numbers)} | body)
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    output, begun = shape.output(), shape.begun(generation.result)
    yield event("response.created", {"response": begun}) + event("response.in_progress", {"response": begun})
    try:
        async for batch in generation:
            yield b"".join(event(one["type"], one) for delta in batch for one in output.take(delta))
    except BespokeError as error:
        yield event("response.failed", {"response": shape.failed(generation.result, output, error)})
        return
    closing = b"".join(event(one["type"], one) for one in output.end())
    result = generation.result
    body = shape.ended(result, output, stored=responses is not None)
    if responses is not None:
        try:
            await asyncio.to_thread(
                responses.store,
                tenant,
                result.request.request_id,
                shape.to_store(body),
                at=result.created_at,
            )
        except Exception:
            # The answer is complete and billed: better told that it is not stored than called a failure.
            log.exception("response of %s is not stored", result.request.request_id)
            body = body | {"store": False}
    kind = "response.completed" if output.complete else "response.incomplete"
    yield closing + event(kind, {"response": body})
