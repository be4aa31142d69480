"""Usage events: what each request used, counted at the engine, one row per request for ever."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa

from serve.billing.pricing import Tokens
from serve.db import Store, UtcDateTime, metadata


class Status(StrEnum):
    COMPLETE = "complete"
    DISCONNECTED = "disconnected"
    FAILED = "failed"


usage_table = sa.Table(
    "usage_events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("request_id", sa.String(64), nullable=False, unique=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("key_id", sa.ForeignKey("api_keys.id"), nullable=False),
    sa.Column("model", sa.String(160), nullable=False),
    sa.Column("base", sa.String(63), nullable=False),
    sa.Column("adapter_version", sa.String(160)),
    sa.Column("plan_id", sa.ForeignKey("price_plans.id"), nullable=False),
    sa.Column("replica", sa.String(64), nullable=False),
    sa.Column("boot", sa.String(32), nullable=False),
    sa.Column("samples", sa.Integer, nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("cached_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
    sa.Column("cost_nanos", sa.BigInteger, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("finish_reason", sa.String(32)),
    sa.Column("ttft_ms", sa.Integer, nullable=False),
    sa.Column("latency_ms", sa.Integer, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("tier", sa.String(8), nullable=False, server_default="default"),
    sa.CheckConstraint("cached_tokens <= prompt_tokens", name="cached_in_prompt"),
    sa.CheckConstraint("cost_nanos >= 0", name="cost_not_negative"),
    sa.CheckConstraint("tier IN ('default', 'batch')", name="tier_known"),
    sa.Index("ix_usage_events_tenant_id_created_at", "tenant_id", "created_at"),
)


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One billed request.

    `samples` is the request's `n`: the engine reads the prompt once per sample and counts it so,
    the customer pays for it once. `replica` and `boot` name the engine process that did the work.
    `tier` is default or batch: at which of the plan's prices.
    """

    request_id: str
    tenant: str
    key_id: str
    model: str
    base: str
    adapter_version: str | None
    plan_id: int
    replica: str
    boot: str
    samples: int
    tokens: Tokens
    cost_nanos: int
    status: Status
    finish_reason: str | None
    ttft_ms: int
    latency_ms: int
    created_at: datetime
    tier: str = "default"

    def row(self) -> dict[str, object]:
        return {
            "request_id": self.request_id,
            "tenant_id": self.tenant,
            "key_id": self.key_id,
            "model": self.model,
            "base": self.base,
            "adapter_version": self.adapter_version,
            "plan_id": self.plan_id,
            "replica": self.replica,
            "boot": self.boot,
            "samples": self.samples,
            "prompt_tokens": self.tokens.prompt,
            "cached_tokens": self.tokens.cached,
            "completion_tokens": self.tokens.completion,
            "cost_nanos": self.cost_nanos,
            "status": self.status.value,
            "finish_reason": self.finish_reason,
            "ttft_ms": self.ttft_ms,
            "latency_ms": self.latency_ms,
            "created_at": self.created_at,
            "tier": self.tier,
        }


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """Totals of one tenant's model and tier under one price version."""

    tenant: str
    model: str
    adapter: bool
    plan_id: int
    requests: int
    tokens: Tokens
    cost_nanos: int
    tier: str = "default"

    @property
    def label(self) -> str:
        return label_of(self.model, self.tier)


def label_of(model: str, tier: str) -> str:
    """How people read what was bought."""
    return model if tier == "default" else f"{model} ({tier})"


@dataclass(frozen=True, slots=True)
class EngineTotal:
    """What the ledger says one engine process did, in the engine's own way of counting."""

    replica: str
    boot: str
    prompt_tokens: int
    completion_tokens: int


class Usage:
    """Questions about the usage events of one store. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def totals(
        self, *, tenant: str | None = None, start: datetime | None = None, end: datetime | None = None
    ) -> list[UsageTotal]:
        """Totals by tenant, model, price version and tier over start ≤ created_at < end."""
        c = usage_table.c
        adapter = c.adapter_version.is_not(None)
        query = (
            sa.select(
                c.tenant_id,
                c.model,
                adapter.label("adapter"),
                c.plan_id,
                c.tier,
                sa.func.count().label("requests"),
                sa.func.sum(c.prompt_tokens).label("prompt"),
                sa.func.sum(c.cached_tokens).label("cached"),
                sa.func.sum(c.completion_tokens).label("completion"),
                sa.func.sum(c.cost_nanos).label("cost_nanos"),
            )
            .group_by(c.tenant_id, c.model, adapter, c.plan_id, c.tier)
            .order_by(c.tenant_id, c.model, c.plan_id, c.tier.desc())
        )
        if tenant is not None:
            query = query.where(c.tenant_id == tenant)
        if start is not None:
            query = query.where(c.created_at >= start)
        if end is not None:
            query = query.where(c.created_at < end)
        with self._store.read() as connection:
            return [
                UsageTotal(
                    row.tenant_id,
                    row.model,
                    bool(row.adapter),
                    row.plan_id,
                    row.requests,
                    Tokens(int(row.prompt), int(row.cached), int(row.completion)),
                    int(row.cost_nanos),
                    row.tier,
                )
                for row in connection.execute(query)
            ]

    def by_engine(self) -> dict[tuple[str, str], EngineTotal]:
        """Totals per (replica, boot), prompts counted once per sample as the engine counts them."""
        c = usage_table.c
        query = sa.select(
            c.replica,
            c.boot,
            sa.func.sum(c.prompt_tokens * c.samples).label("prompt"),
            sa.func.sum(c.completion_tokens).label("completion"),
        ).group_by(c.replica, c.boot)
        with self._store.read() as connection:
            return {
                (row.replica, row.boot): EngineTotal(
                    row.replica, row.boot, int(row.prompt), int(row.completion)
                )
                for row in connection.execute(query)
            }
