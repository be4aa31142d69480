"""/admin/v1/tenants/{tenant}/budgets.

A tenant's admin sees all of its budgets and manages those of its projects and keys. Those of the tenant as a
whole are the platform's, and so is a webhook to the server itself.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field

from serve.api.admin.access import By, Caller
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
LimitNanos = Annotated[int, Field(ge=0, le=LIMIT_NANOS_MAX, description="In nano-USD.")]
Hard = Annotated[bool, Field(description="Refuse what would exceed it; else only notify.")]
NotifyPcts = Annotated[
    list[Annotated[int, Field(ge=1, le=PCT_MAX)]],
    Field(max_length=PCTS_MAX, description="Percentages of the limit at which to notify."),
]
Subject = Annotated[str, Field(min_length=1, max_length=32, pattern="^[a-z0-9_]+$")]
WebhookUrl = Annotated[
    str,
    Field(min_length=1, max_length=URL_LENGTH_MAX, examples=["https://example.com/hooks/budgets"]),
]


class NewBudget(Body):
    """Of the project or the key that is named; of the tenant if none is."""

    project: Subject | None = None
    key: Subject | None = None
    period: Period
    limit_nanos: LimitNanos
    hard: Hard = True
    notify_pcts: NotifyPcts = Field(default_factory=lambda: list(NOTIFY_PCTS))
    webhook_url: WebhookUrl | None = None


class BudgetChange(Body):
    """What is named is changed. A null webhook_url means none."""

    limit_nanos: LimitNanos | None = None
    hard: Hard | None = None
    notify_pcts: NotifyPcts | None = None
    webhook_url: WebhookUrl | None = None

    def named(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in self.model_fields_set}
        return {name: value for name, value in named.items() if value is not None or name == "webhook_url"}


class BudgetWire(Identified):
    """Nano-USD, in UTC periods; what is left is limit − spent − held."""

    object: Literal["budget"] = "budget"
    tenant: str
    level: Literal["tenant", "project", "key"]
    subject: str = Field(description="The tenant's name, or the id of the project or key.")
    period: Period
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
def create(tenant: str, body: NewBudget, by: By, ctx: Ctx) -> BudgetWire:
    """A budget that binds from now on, and counts what its period has spent already."""
    if body.project is not None and body.key is not None:
        raise InvalidRequest("Name a project or a key, not both.", "key", "invalid_value")
    level, subject = "tenant", tenant
    if body.project is not None:
        level, subject = "project", body.project
    elif body.key is not None:
        level, subject = "key", body.key
    _require_right(by, level, body.webhook_url)
    standing = BudgetService(ctx.store).create(
        tenant,
        level,
        subject,
        body.period,
        body.limit_nanos,
        at=now(),
        hard=body.hard,
        notify_pcts=body.notify_pcts,
        webhook_url=body.webhook_url,
        actor=by.actor,
    )
    return wire(standing)


@router.get("/tenants/{tenant}/budgets")
def index(tenant: str, ctx: Ctx, after: After = None, limit: Limit = 20) -> Listing[BudgetWire]:
    ctx.tenants.get(tenant)
    return listing(BudgetService(ctx.store).page(tenant, at=now(), after=after, limit=limit), wire)


@router.get("/tenants/{tenant}/budgets/{budget}")
def show(tenant: str, budget: str, ctx: Ctx) -> BudgetWire:
    return wire(BudgetService(ctx.store).get(tenant, budget, at=now()))


@router.patch("/tenants/{tenant}/budgets/{budget}")
def change(tenant: str, budget: str, body: BudgetChange, by: By, ctx: Ctx) -> BudgetWire:
    """Change what is named. A lower limit binds the next request; what is held already stays held."""
    budgets = BudgetService(ctx.store)
    level = budgets.get(tenant, budget, at=now()).budget.scope
    _require_right(by, level, body.webhook_url)
    return wire(budgets.change(tenant, budget, body.named(), at=now(), actor=by.actor))


@router.delete("/tenants/{tenant}/budgets/{budget}")
def retire(tenant: str, budget: str, by: By, ctx: Ctx) -> BudgetWire:
    """It binds no longer, for good. The record of it stays."""
    budgets = BudgetService(ctx.store)
    _require_right(by, budgets.get(tenant, budget, at=now()).budget.scope, None)
    return wire(budgets.retire(tenant, budget, at=now(), actor=by.actor))


def _require_right(by: Caller, level: str, webhook_url: str | None) -> None:
    """Raises PermissionDenied, InvalidRequest."""
    if isinstance(by, Operator):
        return
    if level == "tenant":
        raise PermissionDenied("platform")
    if webhook_url is not None:
        check_url(webhook_url)
        if is_loopback(webhook_url):
            raise InvalidRequest("'webhook_url' names the server itself.", "webhook_url", "invalid_value")


def wire(standing: BudgetUsage) -> BudgetWire:
    budget = standing.budget
    return BudgetWire.model_validate(
        {
            "id": budget.id,
            "tenant": budget.tenant,
            "level": budget.scope,
            "subject": budget.subject,
            "period": budget.period,
            "limit_nanos": budget.limit_nanos,
            "hard": budget.hard,
            "notify_pcts": list(budget.notify_pcts),
            "webhook_url": budget.webhook_url,
            "current_period": standing.span,
            "spent_nanos": standing.spent_nanos,
            "held_nanos": standing.held_nanos,
            "left_nanos": standing.left_nanos,
            "created_at": seconds(budget.created_at),
            "retired_at": maybe_seconds(budget.retired_at),
        }
    )
