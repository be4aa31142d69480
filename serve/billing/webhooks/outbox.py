"""Webhook outbox: stores events together with what they report, and delivers them at least once.

An event is written in the transaction of what it reports (table `notices`). The steward sends it until the
receiver accepts it, always with the same id. A sender claims an event for a while by a conditional UPDATE.
Two stewards therefore do not send it at the same time, and if one dies the other sends it after the claim.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx
import sqlalchemy as sa

from serve.billing.webhooks.delivery import Post, UnsafeAddress, signed_headers
from serve.storage.database import Store, UtcDateTime, metadata

log = logging.getLogger(__name__)

# Per round: the most events, per tenant, and at a time. A slow receiver delays only its own tenant.
ROUND_MAX, PER_TENANT_MAX, PARALLEL_MAX = 64, 2, 16
CLAIM = timedelta(seconds=60)
RETRY_FIRST, RETRY_MAX = timedelta(seconds=30), timedelta(hours=1)
GIVE_UP_AFTER = timedelta(hours=24)

webhook_events_table = sa.Table(
    "notices",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("url", sa.String(512), nullable=False),  # empty: only logged and counted, never sent
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("next_try_at", UtcDateTime, index=True),  # null: delivered, given up, or not to be sent
    sa.Column("delivered_at", UtcDateTime),
    sa.Column("last_error", sa.String(200)),
    sa.Column("created_at", UtcDateTime, nullable=False),
)


@dataclass(frozen=True, slots=True)
class OutboxMetrics:
    """Counts events for /metrics. `failing` are pending events with at least one failed attempt."""

    pending: int = 0
    failing: int = 0
    delivered: int = 0
    given_up: int = 0
    oldest_pending_at: datetime | None = None


def read_outbox_metrics(store: Store) -> OutboxMetrics:
    c = webhook_events_table.c
    pending = c.next_try_at.is_not(None)
    given_up = sa.and_(c.next_try_at.is_(None), c.delivered_at.is_(None), c.url != "")
    count = sa.func.count()
    query = sa.select(
        count.filter(pending),
        count.filter(pending, c.tries > 0, c.last_error.is_not(None)),
        count.filter(c.delivered_at.is_not(None)),
        count.filter(given_up),
        sa.func.min(c.created_at, type_=c.created_at.type).filter(pending),
    )
    with store.read() as connection:
        return OutboxMetrics(*connection.execute(query.select_from(webhook_events_table)).one())


def enqueue(
    connection: sa.Connection, event_id: str, tenant: str, kind: str, url: str, body: str, *, at: datetime
) -> None:
    """Store an event in the caller's transaction, to be sent to `url` unless that is empty."""
    row = {"id": event_id, "tenant_id": tenant, "kind": kind, "url": url, "body": body, "tries": 0}
    connection.execute(
        webhook_events_table.insert().values(**row, next_try_at=at if url else None, created_at=at)
    )


def deliver_due(store: Store, at: datetime, post: Post, secret_of: Callable[[str], str]) -> int:
    """Send the events due at `at`, signed with `secret_of(tenant)`. Return how many were accepted.

    A rejected event is sent again after 30 s, 60 s, …, at most an hour, for 24 hours.
    """
    return asyncio.run(_deliver(store, at, post, secret_of))


async def _deliver(store: Store, at: datetime, post: Post, secret_of: Callable[[str], str]) -> int:
    semaphore = asyncio.Semaphore(PARALLEL_MAX)

    async def deliver(row: sa.Row[Any]) -> bool:
        async with semaphore:
            if not await asyncio.to_thread(_claim, store, row, at):
                return False
            body = row.body.encode()
            headers = signed_headers(secret_of(row.tenant_id), row.id, body, at=at)
            error = await _send(post, row.url, headers, body)
            if error is not None:  # never the URL or the body, which are the customer's
                log.warning("notice.failed id=%s tries=%d error=%s", row.id, row.tries + 1, error)
            await asyncio.to_thread(_record_attempt, store, row, at, error)
            return error is None

    rows = await asyncio.to_thread(_due, store, at)
    outcomes = await asyncio.gather(*(deliver(row) for row in rows), return_exceptions=True)
    if failures := [outcome for outcome in outcomes if isinstance(outcome, BaseException)]:
        raise failures[0]  # the store's error, raised after all other events were sent
    return sum(outcome is True for outcome in outcomes)


async def _send(post: Post, url: str, headers: dict[str, str], body: bytes) -> str | None:
    """Send one event. Return a short description of the error, or None."""
    try:
        status = await post(url, headers, body)
    except UnsafeAddress:
        return "the host resolves to an address that is not allowed"
    except TimeoutError:
        return "timed out"
    except (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return type(error).__name__
    return None if 200 <= status < 300 else f"HTTP {status}"


def _due(store: Store, at: datetime) -> list["sa.Row[Any]"]:
    c = webhook_events_table.c
    rank = sa.func.row_number().over(partition_by=c.tenant_id, order_by=(c.next_try_at, c.id))
    due = sa.select(webhook_events_table, rank.label("rank")).where(c.next_try_at <= at).subquery()
    query = sa.select(due).where(due.c.rank <= PER_TENANT_MAX).order_by(due.c.next_try_at).limit(ROUND_MAX)
    with store.read() as connection:
        return list(connection.execute(query))


def _claim(store: Store, row: "sa.Row[Any]", at: datetime) -> bool:
    c = webhook_events_table.c
    update = webhook_events_table.update().where(c.id == row.id, c.next_try_at == row.next_try_at)
    with store.write() as connection:
        values = {"next_try_at": at + CLAIM, "tries": c.tries + 1}
        return connection.execute(update.values(values)).rowcount == 1


def _record_attempt(store: Store, row: "sa.Row[Any]", at: datetime, error: str | None) -> None:
    values: dict[str, Any] = {"last_error": error, "next_try_at": None}
    if error is None:
        values["delivered_at"] = at
    else:
        next_try_at = at + min(RETRY_FIRST * 2 ** min(row.tries, 10), RETRY_MAX)
        if next_try_at <= row.created_at + GIVE_UP_AFTER:
            values["next_try_at"] = next_try_at
    c = webhook_events_table.c
    update = webhook_events_table.update().where(c.id == row.id, c.delivered_at.is_(None))
    with store.write() as connection:
        connection.execute(update.values(values))
