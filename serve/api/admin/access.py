"""Who may use which admin route. It is decided before a byte of the body is read.

A platform key may use all of them. A tenant's key with the scope `admin` may use those of its own tenant's
projects and keys; every other tenant, and every other route, looks to it like a tenant that does not exist.
"""

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute

from serve.api.dependencies import admit, bearer, context
from serve.api.schemas import KEY_REQUIRED, errors
from serve.errors import NotFound, PermissionDenied
from serve.tenants import PLATFORM_PREFIX, Operator, Principal

Caller = Operator | Principal

# All that names and ids consist of; anything else names nothing, and need not reach the store.
_PLAIN = re.compile(r"[A-Za-z0-9_.@-]{1,160}")


class PlatformRoute(APIRoute):
    """A route for platform keys only."""

    own_tenant: ClassVar[bool] = False

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer, own_tenant = super().get_route_handler(), self.own_tenant

        async def handler(request: Request) -> Response:
            request.state.caller = await _caller(request, own_tenant)
            return await answer(request)

        return handler


class TenantRoute(PlatformRoute):
    """A route that the admin keys of the path's `{tenant}` may use, too."""

    own_tenant = True


async def _caller(request: Request, own_tenant: bool) -> Caller:
    tenants, key = context(request).tenants, bearer(request)
    caller: Caller
    if key.startswith(PLATFORM_PREFIX):
        caller = await admit(tenants.platform_key_cache, key)
    else:
        caller = await admit(tenants.key_cache, key)
        if "admin" not in caller.scopes:
            raise PermissionDenied("admin")
        if not own_tenant or request.path_params.get("tenant") != caller.tenant:
            raise NotFound()
    if not all(_PLAIN.fullmatch(value) for value in request.path_params.values()):
        raise NotFound()
    return caller


async def _admitted(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


By = Annotated[Caller, Depends(_admitted)]


def router(tag: str, *, own_tenant: bool = False) -> APIRouter:
    """A router of one resource, with its guard and its errors."""
    return APIRouter(
        prefix="/admin/v1",
        tags=[tag],
        route_class=TenantRoute if own_tenant else PlatformRoute,
        dependencies=[KEY_REQUIRED],
        responses=errors(400, 401, 403, 404, 409, 429, 503),
    )
