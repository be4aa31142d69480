"""Defines what the ledger is asked for: to hold the most a request can cost, and to settle or void it."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.billing.metering.events import FailedAttempt, UsageEvent

InTransaction = Callable[[sa.Connection], None]


@dataclass(frozen=True, slots=True)
class Hold:
    """Reserves credit for one request.

    `terms` is the request's `BillingTerms` as JSON text, so that another process can settle it. `owner` is
    the gateway process that opened the hold. The budgets of `project` and `key_id` limit it, too.
    """

    request_id: str
    tenant: str
    amount_nanos: int
    project: str | None = None
    key_id: str | None = None
    terms: str | None = None
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class OpenHold:
    """Describes a hold that is neither settled nor voided."""

    hold: Hold
    created_at: datetime
    lease_expires_at: datetime


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """Asks for a hold. `in_transaction` runs with it, and refuses it by raising.

    `revision` (`serve.storage.revision`) is the revision at which the price was read. At another revision
    the hold is refused with StaleQuote.
    """

    hold: Hold
    at: datetime
    lease: timedelta
    in_transaction: InTransaction | None = None
    revision: int | None = None


@dataclass(frozen=True, slots=True)
class Resolution:
    """Settles a hold if there is an event, else voids it.

    `in_transaction` runs with it, if it resolves the request. `failed` are attempts that are not billed.
    """

    request_id: str
    tenant: str
    at: datetime
    event: UsageEvent | None = None
    reason: str | None = None
    in_transaction: InTransaction | None = None
    failed: tuple[FailedAttempt, ...] = ()

    @property
    def cost_nanos(self) -> int:
        return self.event.cost_nanos if self.event else 0


Outcome = bool | Exception


class StaleQuote(Exception):
    """Signals that a price or a model has changed since the quote; the caller must quote again."""
