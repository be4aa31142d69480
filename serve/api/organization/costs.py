"""GET /v1/organization/costs: charges per day, at list price.

Format: platform.openai.com/docs/api-reference/usage/costs. Our additions: the exact amount in nanos,
`tenant_ids`, and groups by tenant. Amounts of different currencies are results of their own.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from serve.api.dependencies import Ctx
from serve.api.organization.access import Reader, tenants_of
from serve.api.organization.access import router as organization_router
from serve.api.organization.window import GROUPS_MAX, Page, Window, in_buckets, span
from serve.api.pagination import now
from serve.billing.metering.queries import DAY, CostBucket, CostQueries, UsageQuery
from serve.billing.money import NANOS

router: APIRouter = organization_router()

Group = Literal["tenant", "project_id", "api_key_id", "line_item"]
Groups = Annotated[list[Group], Field(max_length=4)]
BY = {"tenant": "tenant", "project_id": "project", "api_key_id": "key"}


class CostsQuery(Window):
    bucket_width: Literal["1d"] = "1d"
    limit: int = Field(7, ge=1, le=180, description="Days a page.")
    group_by: Groups = Field([])
    group_by_: Groups = Field([], alias="group_by[]")


class Amount(BaseModel):
    value: float = Field(description="As near as a number can be; `amount_nanos` is exact.")
    currency: str = Field(description="ISO 4217, in small letters as OpenAI writes it.", examples=["usd"])


class CostsResult(BaseModel):
    """A field that is not grouped by is null; so is the project of costs without one."""

    object: Literal["organization.costs.result"] = "organization.costs.result"
    amount: Amount
    amount_nanos: int = Field(description="Nanos of the amount's currency.")
    tenant: str | None
    line_item: str | None = Field(description="A model, or a charge such as 'training: acme/support@1'.")
    project_id: str | None
    api_key_id: str | None


@router.get("/costs")
def costs(query: Annotated[CostsQuery, Query()], reader: Reader, ctx: Ctx) -> Page[CostsResult]:
    """Costs in buckets of a day."""
    groups = query.names("group_by")
    tenants = tenants_of(reader, query.names("tenant_ids"), grouped="tenant" in groups)
    page = span(query, DAY, query.limit, now=now())
    usage_query = UsageQuery(
        page.start,
        page.end,
        tenants=tenants,
        projects=query.names("project_ids"),
        keys=query.names("api_key_ids"),
        by=frozenset(BY[group] for group in groups if group in BY),
        groups_max=GROUPS_MAX,
    )
    cost_buckets = CostQueries(ctx.store).query(usage_query, line_items="line_item" in groups)
    data, has_more, next_page = in_buckets(page, DAY, ((cost.bucket, _result(cost)) for cost in cost_buckets))
    return Page(data=data, has_more=has_more, next_page=next_page)


def _result(cost: CostBucket) -> CostsResult:
    return CostsResult(
        amount=Amount(value=cost.nanos / NANOS, currency=cost.currency.lower()),
        amount_nanos=cost.nanos,
        tenant=cost.tenant,
        line_item=cost.line_item,
        project_id=cost.project,
        api_key_id=cost.key,
    )
