"""GET /v1/organization/forecast and /balance: the month's projected cost, the credit and the budgets."""

from typing import Any, Literal, cast

from fastapi import APIRouter
from pydantic import BaseModel, Field

from serve.api.dependencies import Ctx
from serve.api.organization.access import Reader, TenantName, tenant_of
from serve.api.organization.access import router as organization_router
from serve.api.pagination import now, seconds
from serve.billing.budgets.service import BudgetService, BudgetUsage
from serve.billing.ledger.ledger import Ledger
from serve.billing.metering.forecast import Forecast, Projection, forecast
from serve.errors import InvalidRequest

router: APIRouter = organization_router()


class ProjectionWire(BaseModel):
    """Nanos of `currency` at list price.

    `low_nanos` and `high_nanos` take the basis' cheapest and dearest day.
    """

    line_item: str | None = Field(description="A model, or a charge; null for the total.")
    currency: str = Field(examples=["USD"])
    to_date_nanos: int
    projected_nanos: int
    low_nanos: int
    high_nanos: int


class ForecastWire(BaseModel):
    object: Literal["organization.forecast"] = "organization.forecast"
    tenant: str | None = Field(description="Null: all of them.")
    start_time: int = Field(description="The month's start, in UTC.")
    end_time: int = Field(description="The month's end.")
    at: int
    method: str = "month to date + mean of the last 7 full days (UTC) x days left"
    basis_days: int = Field(description="How many of those days there were since the first charge.")
    totals: list[ProjectionWire] = Field(description="One for each currency.")
    line_items: list[ProjectionWire]


class BudgetWire(BaseModel):
    """Nanos of `currency`, in the current period.

    A hard budget refuses requests beyond it; a soft one notifies.
    """

    id: str
    level: Literal["tenant", "project", "key"] = Field(description="What it binds; `subject` says which one.")
    subject: str
    period: Literal["day", "month", "total"]
    hard: bool
    currency: str
    limit_nanos: int
    spent_nanos: int
    held_nanos: int
    left_nanos: int


class BalanceWire(BaseModel):
    """Nanos of `currency`; available = credit - spent - held."""

    object: Literal["organization.balance"] = "organization.balance"
    tenant: str
    currency: str = Field(examples=["USD"])
    credit_nanos: int
    spent_nanos: int
    held_nanos: int
    available_nanos: int
    budgets: list[BudgetWire]


@router.get("/forecast")
def month(reader: Reader, ctx: Ctx, tenant: TenantName = None) -> ForecastWire:
    """The projected cost of this month."""
    tenant = tenant_of(reader, tenant)
    return forecast_wire(forecast(ctx.store, tenant=tenant, at=now()), tenant)


@router.get("/balance")
def balance(reader: Reader, ctx: Ctx, tenant: TenantName = None) -> BalanceWire:
    """The credit of a tenant, and its budgets in force."""
    tenant = tenant_of(reader, tenant)
    if tenant is None:
        raise InvalidRequest("tenant: a platform key names one.", "tenant", "missing_required_parameter")
    at = now()
    account = Ledger(ctx.store).account(tenant)
    budgets = BudgetService(ctx.store).page(tenant, at=at).items
    return BalanceWire(
        tenant=tenant,
        currency=account.currency,
        credit_nanos=account.credit_nanos,
        spent_nanos=account.spent_nanos,
        held_nanos=account.held_nanos,
        available_nanos=account.available_nanos,
        budgets=[_budget(usage) for usage in budgets if usage.budget.retired_at is None],
    )


def forecast_wire(month: Forecast, tenant: str | None) -> ForecastWire:
    return ForecastWire(
        tenant=tenant,
        start_time=seconds(month.month),
        end_time=seconds(month.month_end),
        at=seconds(month.at),
        basis_days=month.basis_days,
        totals=[_projection(total) for total in month.totals],
        line_items=[_projection(line_item) for line_item in month.line_items],
    )


def _projection(projection: Projection) -> ProjectionWire:
    return ProjectionWire(
        line_item=projection.line_item,
        currency=projection.currency,
        to_date_nanos=projection.to_date_nanos,
        projected_nanos=projection.projected_nanos,
        low_nanos=projection.low_nanos,
        high_nanos=projection.high_nanos,
    )


def _budget(usage: BudgetUsage) -> BudgetWire:
    budget = usage.budget
    return BudgetWire(
        id=budget.id,
        level=cast(Any, budget.scope),
        subject=budget.subject,
        period=cast(Any, budget.period),
        hard=budget.hard,
        currency=usage.currency,
        limit_nanos=budget.limit_nanos,
        spent_nanos=usage.spent_nanos,
        held_nanos=usage.held_nanos,
        left_nanos=usage.left_nanos,
    )
