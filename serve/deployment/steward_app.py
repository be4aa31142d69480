"""Builds the steward from settings: the composition root of its process, with the list of its jobs."""

import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial

import sqlalchemy as sa

from serve.batches.lines import release_line
from serve.billing.budgets.alerts import send_due_alerts
from serve.billing.jobs import draft_due, expire_due
from serve.billing.metering.rollups import rollup_drift
from serve.billing.webhooks.delivery import post, secret_of
from serve.billing.webhooks.outbox import deliver_due
from serve.client_data.idempotency import release_key
from serve.engine.protocol import Engine
from serve.maintenance.adapter_hours import charge_residency
from serve.maintenance.steward import Steward
from serve.settings import Settings
from serve.storage.database import Store
from serve.tenants import server_secret

log = logging.getLogger(__name__)


def build_steward(settings: Settings, engines: Mapping[str, Engine]) -> Steward:
    """Builds the steward of the store, the engines and this machine's checkpoints.

    Migrates the store first.
    """
    store = Store(settings.store_url)
    store.migrate()
    return Steward(
        store,
        engines,
        settings.checkpoints_dir,
        _release,
        lease=timedelta(seconds=settings.request_timeout_s + 120),
        jobs=_jobs(store, server_secret(settings.home)),
    )


def _jobs(store: Store, secret: bytes) -> dict[str, tuple[float, Callable[[datetime], object]]]:
    """Returns name → (seconds between runs, job).

    Jobs may be repeated, and run in two processes at a time.
    """
    return {
        "budgets": (2.0, partial(send_due_alerts, store)),
        "webhooks": (2.0, lambda at: deliver_due(store, at, post, partial(secret_of, secret))),
        "credits": (60.0, partial(expire_due, store)),
        "adapter-hours": (300.0, partial(charge_residency, store)),
        "drafts": (3600.0, partial(draft_due, store)),
        "rollups": (3600.0, partial(_check_rollups, store)),
    }


def _check_rollups(store: Store, at: datetime) -> None:
    """Compares yesterday's rollups with its events and logs differences.

    `bespoke usage rebuild` repairs them.
    """
    day = (at - timedelta(days=1)).date()
    if differences := rollup_drift(store, day):
        log.error("%d rows of usage by the hour of %s differ from their events", differences, day)


def _release(request_id: str, connection: sa.Connection) -> None:
    """Releases the idempotency key and the batch line of a lost request."""
    release_key(connection, request_id)
    release_line(connection, request_id)
