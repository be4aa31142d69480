"""Billing terms fix who pays which rates for a request before it is dispatched.

They are stored with the hold, so that its gateway can settle the request, or the steward after the gateway
has died.
"""

import json
from dataclasses import dataclass
from datetime import datetime

import msgspec

from serve.billing.metering.events import UsageEvent, UsageStatus
from serve.billing.pricing.plans import Rates, Tokens


@dataclass(frozen=True, slots=True)
class RequestUsage:
    """Counts what a replica did for a request, in absolute numbers. `attempt` counts from 1."""

    replica: str
    boot: str
    tokens: Tokens
    attempt: int = 1
    cold_loads: int = 0


@dataclass(frozen=True, slots=True)
class BillingTerms:
    """Fixes the buyer, model and rates of one request.

    `samples` is the request's `n`, `tier` default or batch.

    A request with `rerun_if_lost` runs again if its gateway dies; only the run that completes is billed.
    """

    tenant: str
    key_id: str
    project: str | None
    model: str
    base: str
    adapter_version: str | None
    plan_id: int
    rates: Rates
    samples: int
    tier: str
    rerun_if_lost: bool = False

    def to_json(self) -> str:
        return msgspec.json.encode(self, enc_hook=Rates.model_dump).decode()

    @classmethod
    def from_json(cls, text: str) -> "BillingTerms":
        fields = json.loads(text)
        return cls(**fields | {"rates": Rates.model_validate(fields["rates"])})

    def event(
        self,
        request_id: str,
        usage: RequestUsage,
        status: UsageStatus,
        finish_reason: str | None,
        *,
        ttft_ms: int,
        latency_ms: int,
        at: datetime,
    ) -> UsageEvent:
        """Return the request's usage event, priced at the agreed rates."""
        return UsageEvent(
            request_id=request_id,
            tenant=self.tenant,
            key_id=self.key_id,
            project=self.project,
            model=self.model,
            base=self.base,
            adapter_version=self.adapter_version,
            plan_id=self.plan_id,
            replica=usage.replica,
            boot=usage.boot,
            attempt=usage.attempt,
            samples=self.samples,
            tier=self.tier,
            tokens=usage.tokens,
            cold_loads=usage.cold_loads,
            cost_nanos=self.rates.cost_nanos(usage.tokens, cold_loads=usage.cold_loads),
            status=status,
            finish_reason=finish_reason,
            ttft_ms=ttft_ms,
            latency_ms=latency_ms,
            created_at=at,
        )
