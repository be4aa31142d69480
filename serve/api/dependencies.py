"""Provides what routes depend on: the gateway's parts (`Ctx`) and the authenticated caller.

`DirectRoute` is for the routes that carry the load: it calls their endpoint without FastAPI's work for each
request.
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


@dataclass(frozen=True, slots=True)
class Context:
    """Holds the parts of one gateway that routes use."""

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


def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def get_context(request: Request) -> Context:
    """`context_of` as a dependency. It is async because FastAPI sends a plain function to a thread."""
    return context_of(request)


async def authorize(request: Request, scope: str) -> Principal:
    """The caller, whose key has `scope`. Raises as `authenticate` does, and PermissionDenied."""
    principal = await authenticate(context_of(request).tenants.key_cache, bearer_key(request))
    if scope not in principal.scopes:
        raise PermissionDenied(scope)
    return principal


async def authenticate(key_cache: KeyCache[PrincipalT], key: str) -> PrincipalT:
    """The key's owner. Of many requests with one key at once, only one reads the store.

    Raises Unauthenticated, TenantSuspended, StoreUnavailable.
    """
    cached = key_cache.cached(key)
    if cached is not None:
        return cached
    return await key_cache.shared(key, lambda: asyncio.to_thread(key_cache.authenticate, key))


def bearer_key(request: Request) -> str:
    """The key in `Authorization`, as OpenAI's clients send it, else in `x-api-key`, as Anthropic's do.

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


def require_scope(scope: str) -> Callable[..., Awaitable[Principal]]:
    """`authorize` as a dependency. It runs before the body is read."""

    async def authorized(request: Request, _documented: Annotated[object, KEY_REQUIRED]) -> Principal:
        return await authorize(request, scope)

    return authorized


Ctx = Annotated[Context, Depends(get_context)]
InferencePrincipal = Annotated[Principal, Depends(require_scope("inference"))]
FilesPrincipal = Annotated[Principal, Depends(require_scope("files"))]


class DirectRoute(APIRoute):
    """Calls `(request, principal: InferencePrincipal, ctx: Ctx) -> Response`, documented as any other route.

    FastAPI would resolve two dependencies and open four exit stacks: a tenth of a request's cost in the
    gateway. Exceptions go to the application's handlers, as everywhere.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = self._respond

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        principal = await authorize(request, "inference")
        response = await self.endpoint(request, principal, context_of(request))
        await response(scope, receive, send)
