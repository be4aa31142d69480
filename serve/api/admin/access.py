"""Guards the admin routes, before a byte of the body is read.

A platform key may use every route. A tenant's key with the scope `admin` may use the routes of its own
tenant's projects, keys and budgets. Every other tenant and route answers it like a tenant that does not
exist.
"""

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute

from serve.api.dependencies import authenticate, bearer_key, context_of
from serve.api.schemas import KEY_REQUIRED, errors
from serve.errors import NotFound, PermissionDenied
from serve.tenants import PLATFORM_PREFIX, Operator, Principal

Caller = Operator | Principal

# The characters of names and ids; any other value names nothing and need not reach the store.
_PLAIN = re.compile(r"[A-Za-z0-9_.@-]{1,160}")


class PlatformRoute(APIRoute):
    """Admits platform keys only."""

    own_tenant: ClassVar[bool] = False

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, own_tenant = super().get_route_handler(), self.own_tenant

        async def handler(request: Request) -> Response:
            request.state.caller = await _admit(request, own_tenant)
            return await handle(request)

        return handler


class TenantRoute(PlatformRoute):
    """Admits platform keys, and the admin keys of the path's `{tenant}`."""

    own_tenant = True


async def _admit(request: Request, own_tenant: bool) -> Caller:
    """Raises Unauthenticated, TenantSuspended, PermissionDenied, NotFound, StoreUnavailable."""
    tenants, key = context_of(request).tenants, bearer_key(request)
    caller: Caller
    if key.startswith(PLATFORM_PREFIX):
        caller = await authenticate(tenants.platform_key_cache, key)
    else:
        caller = await authenticate(tenants.key_cache, key)
        if "admin" not in caller.scopes:
            raise PermissionDenied("admin")
        if not own_tenant or request.path_params.get("tenant") != caller.tenant:
            raise NotFound()
    if not all(_PLAIN.fullmatch(value) for value in request.path_params.values()):
        raise NotFound()
    return caller


async def _caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


AdminCaller = Annotated[Caller, Depends(_caller_of)]


def router(tag: str, *, own_tenant: bool = False) -> APIRouter:
    """A router for one resource, with its guard and its errors."""
    return APIRouter(
        prefix="/admin/v1",
        tags=[tag],
        route_class=TenantRoute if own_tenant else PlatformRoute,
        dependencies=[KEY_REQUIRED],
        responses=errors(400, 401, 403, 404, 409, 429, 503),
    )
