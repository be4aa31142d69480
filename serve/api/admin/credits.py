"""/admin/v1/tenants/{tenant}/grants: give a tenant credit, which may expire, and list its grants."""

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field, StringConstraints

from serve.api.admin.access import AdminCaller
from serve.api.admin.access import router as admin_router
from serve.api.dependencies import Ctx
from serve.api.pagination import (
    After,
    Body,
    Identified,
    Limit,
    Listing,
    listing,
    maybe_seconds,
    moment,
    now,
    seconds,
)
from serve.billing.credits.grants import CREDIT_NANOS_MAX, Credits, Grant
from serve.billing.invoicing.calculation import remaining_credit
from serve.billing.pricing.currencies import currency_of

router: APIRouter = admin_router("credits")


Expiry = Annotated[
    int,
    Field(
        ge=0, le=4_102_444_800, description="Unix time, in seconds. It lasts to the end of that day (UTC)."
    ),
]


class NewGrant(Body):
    amount_nanos: int = Field(ge=1, le=CREDIT_NANOS_MAX)
    kind: Literal["prepaid", "promotional", "line"] = "prepaid"
    expires_at: Expiry | None = None
    reason: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=100)] | None = None


class GrantWire(Identified):
    object: Literal["credit_grant"] = "credit_grant"
    tenant: str
    kind: str
    currency: str
    amount_nanos: int
    left_nanos: int
    expired_nanos: int | None = Field(description="What was taken back when it expired.")
    reason: str | None
    created_at: int
    expires_at: int | None


@router.post("/tenants/{tenant}/grants", status_code=201)
def create(tenant: str, body: NewGrant, caller: AdminCaller, ctx: Ctx) -> GrantWire:
    """Give credit, on top of the tenant's present credit."""
    new_grant = Credits(ctx.store).grant(
        tenant,
        body.amount_nanos,
        kind=body.kind,
        at=now(),
        expires_at=moment(body.expires_at),
        reason=body.reason,
        actor=caller.actor,
    )
    with ctx.store.read() as connection:
        currency = currency_of(connection, tenant)
    return wire(new_grant, new_grant.amount_nanos, currency)


@router.get("/tenants/{tenant}/grants")
def index(tenant: str, ctx: Ctx, after: After = None, limit: Limit = 20) -> Listing[GrantWire]:
    ctx.tenants.get(tenant)
    grants = Credits(ctx.store).page(tenant, after=after, limit=limit)
    with ctx.store.read() as connection:
        left_nanos, currency = remaining_credit(connection, tenant), currency_of(connection, tenant)
    return listing(grants, lambda grant: wire(grant, left_nanos.get(grant.id, 0), currency))


def wire(grant: Grant, left_nanos: int, currency: str) -> GrantWire:
    return GrantWire(
        id=grant.id,
        tenant=grant.tenant,
        kind=grant.kind,
        currency=currency,
        amount_nanos=grant.amount_nanos,
        left_nanos=0 if grant.expired_nanos is not None else left_nanos,
        expired_nanos=grant.expired_nanos,
        reason=grant.reason,
        created_at=seconds(grant.created_at),
        expires_at=maybe_seconds(grant.expires_at),
    )
