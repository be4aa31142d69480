"""GET /v1/organization/usage/completions: tokens and requests over time.

Format: platform.openai.com/docs/api-reference/usage. Our additions: `tenant_ids`, and groups by tenant.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from serve.api.dependencies import Ctx
from serve.api.organization.access import Reader, tenants_of
from serve.api.organization.access import router as organization_router
from serve.api.organization.window import (
    GROUPS_MAX,
    WIDTHS,
    Boolean,
    Names,
    Page,
    Width,
    Window,
    in_buckets,
    span,
)
from serve.api.pagination import now
from serve.billing.metering.queries import UsageBucket, UsageQueries, UsageQuery
from serve.errors import InvalidRequest

router: APIRouter = organization_router()

LIMITS = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}  # default and highest

Group = Literal["tenant", "project_id", "api_key_id", "model", "batch"]
Groups = Annotated[list[Group], Field(max_length=5)]
BY = {"tenant": "tenant", "project_id": "project", "api_key_id": "key", "model": "model", "batch": "tier"}


class CompletionsUsageParams(Window):
    bucket_width: Width = "1d"
    limit: int | None = Field(
        None,
        ge=1,
        le=1440,
        description="Buckets a page: up to 31 (1d, default 7), 168 (1h, 24), 1440 (1m, 60).",
    )
    models: Names = Field([])
    models_: Names = Field([], alias="models[]")
    batch: Boolean | None = Field(None, description="True: batches only. False: none of them.")
    group_by: Groups = Field([])
    group_by_: Groups = Field([], alias="group_by[]")


class CompletionsResult(BaseModel):
    """A field that is not grouped by is null. `input_tokens` include the cached ones."""

    object: Literal["organization.usage.completions.result"] = "organization.usage.completions.result"
    input_tokens: int
    input_cached_tokens: int
    output_tokens: int
    input_audio_tokens: int = 0
    output_audio_tokens: int = 0
    num_model_requests: int
    tenant: str | None
    project_id: str | None
    user_id: str | None = None
    api_key_id: str | None
    model: str | None
    batch: bool | None
    service_tier: str | None = None


@router.get("/usage/completions")
def completions(
    query: Annotated[CompletionsUsageParams, Query()], reader: Reader, ctx: Ctx
) -> Page[CompletionsResult]:
    """Tokens and requests in buckets of a minute, an hour or a day."""
    width = WIDTHS[query.bucket_width]
    default, highest = LIMITS[query.bucket_width]
    limit = query.limit or default
    if limit > highest:
        text = f"limit: at most {highest} buckets of {query.bucket_width}."
        raise InvalidRequest(text, "limit", "invalid_value")
    by = frozenset(BY[group] for group in query.names("group_by"))
    tenants = tenants_of(reader, query.names("tenant_ids"), grouped="tenant" in by)
    page = span(query, width, limit, now=now())
    usage_query = UsageQuery(
        page.start,
        page.end,
        width,
        tenants=tenants,
        projects=query.names("project_ids"),
        keys=query.names("api_key_ids"),
        models=query.names("models"),
        tier=None if query.batch is None else "batch" if query.batch else "default",
        by=by,
        groups_max=GROUPS_MAX,
    )
    usage_buckets = UsageQueries(ctx.store).query(usage_query)
    data, has_more, next_page = in_buckets(
        page, width, ((usage.bucket, wire(usage)) for usage in usage_buckets)
    )
    return Page(data=data, has_more=has_more, next_page=next_page)


def wire(usage: UsageBucket) -> CompletionsResult:
    return CompletionsResult(
        input_tokens=usage.tokens.prompt,
        input_cached_tokens=usage.tokens.cached,
        output_tokens=usage.tokens.completion,
        num_model_requests=usage.requests,
        tenant=usage.tenant,
        project_id=usage.project,
        api_key_id=usage.key,
        model=usage.model,
        batch=None if usage.tier is None else usage.tier == "batch",
    )
