"""A whole answer, given once: whatever it is made into, an Idempotency-Key finds it again."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from fastapi import Request
from starlette.responses import Response

from serve.api.connection import dumps, start, unless_gone
from serve.api.context import Context
from serve.call import Call, Keeper
from serve.generation import Generation
from serve.tenants import Principal


class Keepers:
    """Several keepers as one, in their order."""

    def __init__(self, *keepers: Keeper) -> None:
        self._keepers = keepers

    def claim(self, connection: sa.Connection, at: datetime) -> None:
        for keeper in self._keepers:
            keeper.claim(connection, at)

    def keep(self, connection: sa.Connection, generation: Generation) -> None:
        for keeper in self._keepers:
            keeper.keep(connection, generation)

    def release(self, connection: sa.Connection) -> None:
        for keeper in self._keepers:
            keeper.release(connection)


async def answer_once(
    request: Request,
    ctx: Context,
    who: Principal,
    call: Call,
    render: Callable[[Generation], dict[str, Any]],
) -> Response:
    """Generate `call`, which is whole, and answer what `render` makes of it.

    Under an Idempotency-Key the answer is kept, and then its client's leaving does not stop it: the retry
    finds the answer. Without, a client that leaves while it waits cancels it.
    """
    key = request.headers.get("idempotency-key")
    if key is not None:
        content = request.url.path.encode() + b"\n" + await request.body()
        at = ctx.gateway.terms.now()
        kept = await asyncio.to_thread(ctx.idempotency.find, who.tenant, key, content, at=at)
        if kept is not None:
            headers = {"idempotency-replayed": "true", "x-original-request-id": kept.request_id}
            return Response(kept.body, media_type="application/json", headers=headers)
        keeper: Keeper = ctx.idempotency.keeper(
            who.tenant, key, content, call.request_id, lambda generation: dumps(render(generation)).decode()
        )
        if call.keeper is not None:
            keeper = Keepers(call.keeper, keeper)  # in this order: what the first has kept is rendered
        call = replace(call, keeper=keeper, persistent=True)

    async def work() -> Response:
        generation = await start(request, ctx, who, call)
        try:
            async for _ in generation:
                pass
        finally:
            generation.close()
        return Response(dumps(render(generation)), media_type="application/json")

    return await unless_gone(request, work())
