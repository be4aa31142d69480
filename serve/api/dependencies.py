"""What the routes share: the gateway's parts, and who is asking.

The routes that carry the load: their endpoint is called without FastAPI's work for each request.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from serve.api.schemas import KEY_REQUIRED
from serve.client_data.idempotency import Idempotency
from serve.engine.protocol import Engine
from serve.errors import PermissionDenied, Unauthenticated
from serve.formats.sampling import RequestBounds
from serve.inference.gateway import Gateway
from serve.maintenance.steward import StewardClient
from serve.observability.metrics import GatewayPeers, Metrics
from serve.registry.registry import AdapterRegistry
from serve.storage.database import Store
from serve.tenants import Principal, Tenants
from serve.tenants.key_cache import KeyCache, PrincipalT


class DirectRoute(APIRoute):
    """A route whose endpoint is `(request, who: Inference, ctx: Ctx) -> Response`, documented as any other.

    FastAPI would resolve two dependencies and open four exit stacks for it: a tenth of what a request costs
    the gateway. What is raised goes to the application's handlers, as everywhere.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        response = await self.endpoint(request, await caller(request, "inference"), context(request))
        await response(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Context:
    gateway: Gateway
    tenants: Tenants
    registry: AdapterRegistry
    engines: Mapping[str, Engine]
    store: Store
    metrics: Metrics
    limits: RequestBounds
    idempotency: Idempotency
    steward: StewardClient | None
    peers: GatewayPeers | None = None


def context(request: Request) -> Context:
    found: Context = request.app.state.context
    return found


async def shared(request: Request) -> Context:
    """`context` as a dependency: a plain function would be sent to a thread."""
    return context(request)


def bearer(request: Request) -> str:
    """The key that came with the request: as OpenAI's clients send it or, without that, as Anthropic's do.

    Raises Unauthenticated if there is none.
    """
    authorization = request.headers.get("authorization")
    if authorization is None:
        kind, key = "bearer", request.headers.get("x-api-key", "")
    else:
        kind, _, key = authorization.partition(" ")
    if kind.lower() != "bearer" or not key.strip():
        raise Unauthenticated(
            "You didn't provide an API key. Send it in the Authorization header: 'Bearer YOUR_KEY'."
        )
    return key.strip()


async def admit(key_cache: KeyCache[PrincipalT], key: str) -> PrincipalT:
    """Whose key it is; of many requests with one key at once, one asks the store.

    Raises Unauthenticated, TenantSuspended, StoreUnavailable.
    """
    who = key_cache.cached(key)
    return (
        await key_cache.shared(key, lambda: asyncio.to_thread(key_cache.authenticate, key))
        if who is None
        else who
    )


async def caller(request: Request, scope: str) -> Principal:
    """Who is asking, and holds `scope`. Raises as `admit` does, and PermissionDenied."""
    who = await admit(context(request).tenants.key_cache, bearer(request))
    if scope not in who.scopes:
        raise PermissionDenied(scope)
    return who


def principal(scope: str) -> Callable[..., Awaitable[Principal]]:
    """`caller` as a dependency. It runs before the body is read."""

    async def authenticated(request: Request, _documented: Annotated[object, KEY_REQUIRED]) -> Principal:
        return await caller(request, scope)

    return authenticated


Ctx = Annotated[Context, Depends(shared)]
Inference = Annotated[Principal, Depends(principal("inference"))]
Files = Annotated[Principal, Depends(principal("files"))]
FineTuning = Annotated[Principal, Depends(principal("fine-tuning"))]
BillingRead = Annotated[Principal, Depends(principal("billing-read"))]
