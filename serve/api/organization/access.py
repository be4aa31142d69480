"""Guards `/v1/organization`: a platform key reads all tenants, a `billing-read` key its own tenant."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from serve.api.dependencies import authenticate, bearer_key, context_of
from serve.api.pagination import PlainName
from serve.api.schemas import KEY_REQUIRED, errors
from serve.errors import InvalidRequest, PermissionDenied
from serve.tenants import PLATFORM_PREFIX, Operator, Principal


async def _reader(request: Request, _documented: Annotated[object, KEY_REQUIRED]) -> Operator | Principal:
    tenants, key = context_of(request).tenants, bearer_key(request)
    if key.startswith(PLATFORM_PREFIX):
        return await authenticate(tenants.platform_key_cache, key)
    principal = await authenticate(tenants.key_cache, key)
    if "billing-read" not in principal.scopes:
        raise PermissionDenied("billing-read")
    return principal


Reader = Annotated[Operator | Principal, Depends(_reader)]
TenantName = Annotated[
    PlainName | None, Query(description="For platform keys: whose. A tenant's key reads its own tenant.")
]


def router() -> APIRouter:
    return APIRouter(
        prefix="/v1/organization", tags=["organization"], responses=errors(400, 401, 403, 404, 429, 503)
    )


def tenants_of(reader: Operator | Principal, names: tuple[str, ...], *, grouped: bool) -> tuple[str, ...]:
    """The tenants that the reader may query; (): all. Raises InvalidRequest if a tenant's key names any."""
    if isinstance(reader, Operator):
        return names
    if names or grouped:
        param = "tenant_ids" if names else "group_by"
        raise InvalidRequest(f"{param}: only platform keys tell tenants apart.", param, "invalid_value")
    return (reader.tenant,)


def tenant_of(reader: Operator | Principal, name: str | None) -> str | None:
    """The tenant to query; None: all. Raises InvalidRequest if a tenant's key names another tenant."""
    if isinstance(reader, Operator):
        return name
    if name not in (None, reader.tenant):
        raise InvalidRequest("tenant: this key reads its own tenant only.", "tenant", "invalid_value")
    return reader.tenant
