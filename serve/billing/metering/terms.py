"""What was agreed before a request was dispatched: who buys what at which rates.

It is kept with the hold, so that whoever has to settle the request can: its gateway, or the steward after
that has died.
"""

import json
from dataclasses import dataclass
from datetime import datetime

import msgspec

from serve.billing.metering.events import UsageEvent, UsageStatus
from serve.billing.pricing.plans import Rates, Tokens


@dataclass(frozen=True, slots=True)
class RequestUsage:
    """What a replica did for a request, in absolute counts. `attempt` counts from 1."""

    replica: str
    boot: str
    tokens: Tokens
    attempt: int = 1
    cold_loads: int = 0


@dataclass(frozen=True, slots=True)
class BillingTerms:
    """`samples` is the request's `n`, `tier` default or batch.

    Of one that comes `again` somebody wants the whole answer, and asks anew if it is lost: then only the
    answer that arrives is billed.
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
        said = json.loads(text)
        return cls(**said | {"rates": Rates.model_validate(said["rates"])})

    def event(
        self,
        request_id: str,
        served: RequestUsage,
        status: UsageStatus,
        finish_reason: str | None,
        *,
        ttft_ms: int,
        latency_ms: int,
        at: datetime,
    ) -> UsageEvent:
        """The usage event of the request, priced at the agreed rates."""
        return UsageEvent(
            request_id=request_id,
            tenant=self.tenant,
            key_id=self.key_id,
            project=self.project,
            model=self.model,
            base=self.base,
            adapter_version=self.adapter_version,
            plan_id=self.plan_id,
            replica=served.replica,
            boot=served.boot,
            attempt=served.attempt,
            samples=self.samples,
            tier=self.tier,
            tokens=served.tokens,
            cold_loads=served.cold_loads,
            cost_nanos=self.rates.cost_nanos(served.tokens, cold_loads=served.cold_loads),
            status=status,
            finish_reason=finish_reason,
            ttft_ms=ttft_ms,
            latency_ms=latency_ms,
            created_at=at,
        )
