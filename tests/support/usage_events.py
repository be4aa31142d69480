"""Makes usage events as a gateway writes them: 10 prompt tokens, 4 of them cached, 5 completion tokens."""

from dataclasses import replace
from datetime import datetime
from typing import Any

from serve.billing.metering.events import UsageEvent, UsageStatus
from serve.billing.pricing.plans import Tokens
from tests.support.constants import NOON

COST_NANOS = 700
_EVENT = UsageEvent(
    request_id="",
    tenant="acme",
    key_id="",
    model="tiny",
    base="tiny",
    adapter_version=None,
    plan_id=0,
    replica="r",
    boot="b",
    samples=1,
    tokens=Tokens(10, 4, 5),
    cost_nanos=COST_NANOS,
    status=UsageStatus.COMPLETE,
    finish_reason="stop",
    ttft_ms=1,
    latency_ms=2,
    created_at=NOON,
)


def usage_event(
    request_id: str, *, key_id: str, plan_id: int, at: datetime = NOON, **changes: Any
) -> UsageEvent:
    """A request by acme to the base, complete at `at`, with `changes`."""
    return replace(_EVENT, request_id=request_id, key_id=key_id, plan_id=plan_id, created_at=at, **changes)
