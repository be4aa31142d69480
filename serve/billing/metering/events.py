"""Usage events record what each request used, as counted by the engine: one permanent row per request."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa

from serve.billing.pricing.plans import Tokens
from serve.storage.database import RowId, UtcDateTime, metadata


class UsageStatus(StrEnum):
    """Names how a request ended.

    INCOMPLETE: its gateway died, and it is billed by the count of the engine or of the last checkpoint.
    """

    COMPLETE = "complete"
    DISCONNECTED = "disconnected"
    FAILED = "failed"
    INCOMPLETE = "incomplete"


usage_table = sa.Table(
    "usage_events",
    metadata,
    sa.Column("id", RowId, primary_key=True),
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
    sa.Column("project", sa.String(63)),
    sa.Column("attempt", sa.SmallInteger, nullable=False, server_default="1"),
    sa.Column("cold_loads", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("period", sa.String(7), nullable=False, server_default=""),
    sa.CheckConstraint("cached_tokens <= prompt_tokens", name="cached_in_prompt"),
    sa.CheckConstraint("cost_nanos >= 0", name="cost_not_negative"),
    sa.CheckConstraint("tier IN ('default', 'batch')", name="tier_known"),
    sa.Index("ix_usage_events_tenant_id_created_at", "tenant_id", "created_at"),
    sa.Index("ix_usage_events_tenant_id_period", "tenant_id", "period", "created_at"),
)

attempts_table = sa.Table(
    "failed_attempts",
    metadata,
    sa.Column("request_id", sa.String(64), primary_key=True),
    sa.Column("attempt", sa.SmallInteger, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("model", sa.String(160), nullable=False),
    sa.Column("replica", sa.String(64)),
    sa.Column("boot", sa.String(32)),
    sa.Column("error", sa.String(64), nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """Records an attempt at a request that delivered nothing to the client. It is not billed.

    The tokens are those that the engine counted anyway, the prompt once per sample. A prompt without a
    completion may never have been read, and is not among them; a text that was embedded was read.
    """

    request_id: str
    attempt: int
    tenant: str
    model: str
    replica: str | None
    boot: str | None
    error: str
    created_at: datetime
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def row(self) -> dict[str, object]:
        return {
            "request_id": self.request_id,
            "attempt": self.attempt,
            "tenant_id": self.tenant,
            "model": self.model,
            "replica": self.replica,
            "boot": self.boot,
            "error": self.error[:64],
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "created_at": self.created_at,
        }


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """Records one billed request.

    `samples` is the request's `n`. The engine reads and counts the prompt once per sample; the customer
    pays for it once. `replica` and `boot` name the engine process that did the work. `tier` (default or
    batch) selects the plan's prices. `attempt` is the attempt that is billed. `cold_loads` counts adapter
    loads that the request waited for. The ledger adds the billing period.
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
    status: UsageStatus
    finish_reason: str | None
    ttft_ms: int
    latency_ms: int
    created_at: datetime
    tier: str = "default"
    project: str | None = None
    attempt: int = 1
    cold_loads: int = 0

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
            "project": self.project,
            "attempt": self.attempt,
            "cold_loads": self.cold_loads,
        }


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """Sums the usage of one tenant's model and tier under one price version."""

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
    """Return the display name of a model and tier."""
    return model if tier == "default" else f"{model} ({tier})"


@dataclass(frozen=True, slots=True)
class EngineTotal:
    """Sums the ledger's usage of one engine process, counted as the engine counts."""

    replica: str
    boot: str
    prompt_tokens: int
    completion_tokens: int
