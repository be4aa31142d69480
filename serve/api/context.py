"""What the routes share: the gateway's parts, and who is asking."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from serve.adapters import Catalogue
from serve.api.wire import Limits
from serve.db import Store
from serve.engine.base import Engine
from serve.errors import PermissionDenied, Unauthenticated
from serve.gateway import Gateway
from serve.metrics import Metrics
from serve.tenants import Principal, Tenants


@dataclass(frozen=True, slots=True)
class Context:
    gateway: Gateway
    tenants: Tenants
    catalogue: Catalogue
    engines: Mapping[str, Engine]
    store: Store
    metrics: Metrics
    limits: Limits


def context(request: Request) -> Context:
    found: Context = request.app.state.context
    return found


def principal(scope: str) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency: the caller, who must hold `scope`. It runs before the body is read."""

    async def authenticated(request: Request) -> Principal:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise Unauthenticated(
                "You didn't provide an API key. Send it in the Authorization header: 'Bearer YOUR_KEY'."
            )
        who = await asyncio.to_thread(context(request).tenants.authenticate, key.strip())
        if scope not in who.scopes:
            raise PermissionDenied(scope)
        return who

    return authenticated


Ctx = Annotated[Context, Depends(context)]
Inference = Annotated[Principal, Depends(principal("inference"))]
