"""/admin/v1/tenants/{tenant}/budgets: create, read, change and retire budgets.

A tenant's admin sees all of its budgets and manages those of its projects and keys. Only the platform manages
budgets of a whole tenant, and webhooks to the server itself.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field

from serve.api.admin.access import AdminCaller, Caller
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
    now,
    seconds,
)
from serve.billing.budgets.service import (
    LIMIT_NANOS_MAX,
    NOTIFY_PCTS,
    PCT_MAX,
    PCTS_MAX,
    BudgetService,
    BudgetUsage,
)
from serve.billing.webhooks.delivery import URL_LENGTH_MAX, check_url, is_loopback
from serve.errors import InvalidRequest, PermissionDenied
from serve.tenants import Operator

router: APIRouter = admin_router("budgets", own_tenant=True)

Period = Literal["day", "month", "total"]
LimitNanos = Annotated[int, Field(ge=0, le=LIMIT_NANOS_MAX, description="In nanos of the tenant's currency.")]
Hard = Annotated[bool, Field(description="Refuse what would exceed it; else only notify.")]
NotifyPcts = Annotated[
    list[Annotated[int, Field(ge=1, le=PCT_MAX)]],
    Field(max_length=PCTS_MAX, fail_fast=True, description="Percentages of the limit at which to notify."),
]
Subject = Annotated[str, Field(min_length=1, max_length=32, pattern="^[a-z0-9_]+$")]
WebhookUrl = Annotated[
    str,
    Field(min_length=1, max_length=URL_LENGTH_MAX, examples=["https://example.com/hooks/budgets"]),
]


class NewBudget(Body):
    """Binds the named project or key, or the tenant if none is named."""

    project: Subject | None = None
    key: Subject | None = None
    period: Period
    limit_nanos: LimitNanos
    hard: Hard = True
    notify_pcts: NotifyPcts = Field(default_factory=lambda: list(NOTIFY_PCTS))
    webhook_url: WebhookUrl | None = None


class BudgetChange(Body):
    """Changes the named fields only. A null webhook_url removes the webhook."""

    limit_nanos: LimitNanos | None = None
    hard: Hard | None = None
    notify_pcts: NotifyPcts | None = None
    webhook_url: WebhookUrl | None = None

    def named(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return {name: value for name, value in fields.items() if value is not None or name == "webhook_url"}


class BudgetWire(Identified):
    """Nanos of `currency`, in UTC periods; left = limit − spent − held."""

    object: Literal["budget"] = "budget"
    tenant: str
    level: Literal["tenant", "project", "key"]
    subject: str = Field(description="The tenant's name, or the id of the project or key.")
    period: Period
    currency: str
    limit_nanos: int
    hard: bool
    notify_pcts: list[int]
    webhook_url: str | None
    current_period: str = Field(description="2026-11-24, 2026-11 or total.")
    spent_nanos: int
    held_nanos: int
    left_nanos: int
    created_at: int
    retired_at: int | None


@router.post("/tenants/{tenant}/budgets", status_code=201)
def create(tenant: str, body: NewBudget, caller: AdminCaller, ctx: Ctx) -> BudgetWire:
    """Create a budget. It binds from now on, and counts what its period has spent already."""
    if body.project is not None and body.key is not None:
        raise InvalidRequest("Name a project or a key, not both.", "key", "invalid_value")
    level, subject = "tenant", tenant
    if body.project is not None:
        level, subject = "project", body.project
    elif body.key is not None:
        level, subject = "key", body.key
    _require_right(caller, level, body.webhook_url)
    usage = BudgetService(ctx.store).create(
        tenant,
        level,
        subject,
        body.period,
        body.limit_nanos,
        at=now(),
        hard=body.hard,
        notify_pcts=body.notify_pcts,
        webhook_url=body.webhook_url,
        actor=caller.actor,
    )
    return wire(usage)


@router.get("/tenants/{tenant}/budgets")
def index(tenant: str, ctx: Ctx, after: After = None, limit: Limit = 20) -> Listing[BudgetWire]:
    ctx.tenants.get(tenant)
    return listing(BudgetService(ctx.store).page(tenant, at=now(), after=after, limit=limit), wire)


@router.get("/tenants/{tenant}/budgets/{budget}")
def show(tenant: str, budget: str, ctx: Ctx) -> BudgetWire:
    return wire(BudgetService(ctx.store).get(tenant, budget, at=now()))


@router.patch("/tenants/{tenant}/budgets/{budget}")
def change(tenant: str, budget: str, body: BudgetChange, caller: AdminCaller, ctx: Ctx) -> BudgetWire:
    """Change the named fields. A lower limit binds the next request; open holds stay."""
    budgets = BudgetService(ctx.store)
    level = budgets.get(tenant, budget, at=now()).budget.scope
    _require_right(caller, level, body.webhook_url)
    return wire(budgets.change(tenant, budget, body.named(), at=now(), actor=caller.actor))


@router.delete("/tenants/{tenant}/budgets/{budget}")
def retire(tenant: str, budget: str, caller: AdminCaller, ctx: Ctx) -> BudgetWire:
    """Retire it for good: it binds no request. Its record stays."""
    budgets = BudgetService(ctx.store)
    _require_right(caller, budgets.get(tenant, budget, at=now()).budget.scope, None)
    return wire(budgets.retire(tenant, budget, at=now(), actor=caller.actor))


def _require_right(caller: Caller, level: str, webhook_url: str | None) -> None:
    """Raises PermissionDenied, InvalidRequest."""
    if isinstance(caller, Operator):
        return
    if level == "tenant":
        raise PermissionDenied("platform")
    if webhook_url is not None:
        check_url(webhook_url)
        if is_loopback(webhook_url):
            raise InvalidRequest("'webhook_url' names the server itself.", "webhook_url", "invalid_value")


def wire(usage: BudgetUsage) -> BudgetWire:
    budget = usage.budget
    return BudgetWire.model_validate(
        {
            "id": budget.id,
            "tenant": budget.tenant,
            "level": budget.scope,
            "subject": budget.subject,
            "period": budget.period,
            "currency": usage.currency,
            "limit_nanos": budget.limit_nanos,
            "hard": budget.hard,
            "notify_pcts": list(budget.notify_pcts),
            "webhook_url": budget.webhook_url,
            "current_period": usage.span,
            "spent_nanos": usage.spent_nanos,
            "held_nanos": usage.held_nanos,
            "left_nanos": usage.left_nanos,
            "created_at": seconds(budget.created_at),
            "retired_at": maybe_seconds(budget.retired_at),
        }
    )
