"""Who reads what: a platform key all tenants, a tenant's key with `billing-read` its own."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from serve.api.dependencies import admit, bearer, context
from serve.api.pagination import PlainName
from serve.api.schemas import KEY_REQUIRED, errors
from serve.errors import InvalidRequest, PermissionDenied
from serve.tenants import PLATFORM_PREFIX, Operator, Principal


async def _reader(request: Request, _documented: Annotated[object, KEY_REQUIRED]) -> Operator | Principal:
    tenants, key = context(request).tenants, bearer(request)
    if key.startswith(PLATFORM_PREFIX):
        return await admit(tenants.platform_key_cache, key)
    who = await admit(tenants.key_cache, key)
    if "billing-read" not in who.scopes:
        raise PermissionDenied("billing-read")
    return who


Reader = Annotated[Operator | Principal, Depends(_reader)]
TenantName = Annotated[
    PlainName | None, Query(description="For platform keys: whose. A tenant's key reads its own tenant.")
]


def router() -> APIRouter:
    return APIRouter(
        prefix="/v1/organization", tags=["organization"], responses=errors(400, 401, 403, 404, 429, 503)
    )


def tenants_of(reader: Operator | Principal, asked: tuple[str, ...], *, grouped: bool) -> tuple[str, ...]:
    """The tenants to be asked about; none: all. Raises InvalidRequest if a tenant's key names any."""
    if isinstance(reader, Operator):
        return asked
    if asked or grouped:
        param = "tenant_ids" if asked else "group_by"
        raise InvalidRequest(f"{param}: only platform keys tell tenants apart.", param, "invalid_value")
    return (reader.tenant,)


def tenant_of(reader: Operator | Principal, asked: str | None) -> str | None:
    """The tenant to be asked about; None: all. Raises InvalidRequest if a tenant's key names another."""
    if isinstance(reader, Operator):
        return asked
    if asked not in (None, reader.tenant):
        raise InvalidRequest("tenant: this key reads its own tenant only.", "tenant", "invalid_value")
    return reader.tenant
