"""/admin/v1/prices: publish price plans, and subscribe a tenant to one."""

from datetime import timedelta
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
    Listing,
    PlainName,
    Timestamp,
    listing,
    moment,
    now,
    seconds,
    slice_page,
)
from serve.billing.pricing.plans import PricePlan, Prices, PriceVersion
from serve.errors import InvalidRequest

router: APIRouter = admin_router("prices")


class PriceWire(Identified):
    """One immutable version of a plan."""

    object: Literal["price"] = "price"
    version: int
    plan: PricePlan


class NewSubscription(Body):
    plan: PlainName | None = Field(description="null: the tenant's plan ends.")
    effective_at: Timestamp | None = Field(None, description="Not in the past; null: from now on.")


class SubscriptionWire(BaseModel):
    object: Literal["subscription"] = "subscription"
    tenant: str
    price: PriceWire | None = Field(description="null: no plan from then on.")
    effective_at: int


@router.post("/prices", status_code=201)
def publish(body: PricePlan, caller: AdminCaller, ctx: Ctx) -> PriceWire:
    """Store a plan as a new version. An unchanged plan keeps its version."""
    return wire(Prices(ctx.store).publish(body, at=now(), actor=caller.actor))


@router.get("/prices")
def index(ctx: Ctx, after: After = None, limit: Limit = 20) -> Listing[PriceWire]:
    return listing(slice_page(Prices(ctx.store).versions(), _id, after, limit), wire)


@router.put("/tenants/{tenant}/subscription")
def subscribe(tenant: str, body: NewSubscription, caller: AdminCaller, ctx: Ctx) -> SubscriptionWire:
    """Subscribe a tenant to a plan's newest version that may be in force by then, or end its subscription."""
    at = moment(body.effective_at) or now()
    if at < now() - timedelta(seconds=1):
        raise InvalidRequest("What is past keeps its price.", "effective_at", "invalid_value")
    prices = Prices(ctx.store)
    if body.plan is None:
        prices.end(tenant, at=at, actor=caller.actor)
        return SubscriptionWire(tenant=tenant, price=None, effective_at=seconds(at))
    version = prices.subscribe(tenant, body.plan, at=at, actor=caller.actor)
    return SubscriptionWire(tenant=tenant, price=wire(version), effective_at=seconds(at))


def _id(version: PriceVersion) -> str:
    return f"{version.plan.name}@{version.version}"


def wire(version: PriceVersion) -> PriceWire:
    return PriceWire(id=_id(version), version=version.version, plan=version.plan)
