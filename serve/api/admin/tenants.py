"""/admin/v1/tenants: create and change tenants, and set their credit."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from serve.api.admin.access import AdminCaller
from serve.api.admin.access import router as admin_router
from serve.api.dependencies import Ctx
from serve.api.pagination import (
    After,
    Body,
    Identified,
    Limit,
    LimitsBody,
    LimitsWire,
    Listing,
    PlainName,
    Scope,
    listing,
    maybe_seconds,
    now,
    seconds,
)
from serve.billing.ledger.accounts import Account
from serve.billing.ledger.ledger import Ledger
from serve.tenants import Tenant

router: APIRouter = admin_router("tenants")

CREDIT_NANOS_MAX = 10**18  # a thousand million of a currency; sums of it stay inside the store's 64 bits


class NewTenant(Body):
    name: PlainName
    credit_nanos: int = Field(
        0, ge=0, le=CREDIT_NANOS_MAX, description="What it may spend, in nanos of its currency."
    )


class TenantChange(Body):
    suspended: bool | None = Field(None, description="True refuses all of its keys with 403.")
    scopes: list[Scope] | None = Field(None, max_length=16, description="All that its keys may have.")
    limits: LimitsBody | None = None


class Credit(Body):
    credit_nanos: int = Field(ge=0, le=CREDIT_NANOS_MAX)


class TenantWire(Identified):
    object: Literal["tenant"] = "tenant"
    created_at: int
    suspended_at: int | None
    scopes: list[Scope]
    limits: LimitsWire


class AccountWire(BaseModel):
    """Nanos of `currency`; available = credit − spent − held."""

    object: Literal["account"] = "account"
    tenant: str
    currency: str
    credit_nanos: int
    spent_nanos: int
    held_nanos: int
    available_nanos: int


@router.post("/tenants", status_code=201)
def create(body: NewTenant, caller: AdminCaller, ctx: Ctx) -> TenantWire:
    """Create a tenant and its account."""
    ctx.tenants.create(body.name, at=now(), actor=caller.actor)
    Ledger(ctx.store).open_account(body.name, body.credit_nanos, actor=caller.actor)
    return wire(ctx.tenants.get(body.name))


@router.get("/tenants")
def index(ctx: Ctx, after: After = None, limit: Limit = 20) -> Listing[TenantWire]:
    return listing(ctx.tenants.page(after=after, limit=limit), wire)


@router.get("/tenants/{tenant}")
def show(tenant: str, ctx: Ctx) -> TenantWire:
    return wire(ctx.tenants.get(tenant))


@router.patch("/tenants/{tenant}")
def change(tenant: str, body: TenantChange, caller: AdminCaller, ctx: Ctx) -> TenantWire:
    """Suspend or resume it, set the scopes its keys may have, change the named limits."""
    changed = ctx.tenants.change(
        tenant,
        at=now(),
        suspended=body.suspended,
        scopes=None if body.scopes is None else frozenset(body.scopes),
        limits=body.limits.named() if body.limits else None,
        actor=caller.actor,
    )
    return wire(changed)


@router.put("/tenants/{tenant}/credit")
def credit(tenant: str, body: Credit, caller: AdminCaller, ctx: Ctx) -> AccountWire:
    """Set its credit. Its spending stays."""
    ledger = Ledger(ctx.store)
    ledger.open_account(tenant, body.credit_nanos, actor=caller.actor)
    return account_wire(tenant, ledger.account(tenant))


def wire(tenant: Tenant) -> TenantWire:
    return TenantWire(
        id=tenant.id,
        created_at=seconds(tenant.created_at),
        suspended_at=maybe_seconds(tenant.suspended_at),
        scopes=sorted(tenant.scopes),
        limits=LimitsWire.of(tenant.limits),
    )


def account_wire(tenant: str, account: Account) -> AccountWire:
    return AccountWire(
        tenant=tenant,
        currency=account.currency,
        credit_nanos=account.credit_nanos,
        spent_nanos=account.spent_nanos,
        held_nanos=account.held_nanos,
        available_nanos=account.available_nanos,
    )
