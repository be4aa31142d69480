"""Audit log: records who changed which tenant, key, price or adapter.

A row is written in the transaction of the action, so neither exists without the other. Rows are only
added: triggers in the store refuse to change or delete them (migration 0004). `details` hold the
parameters of the action, never a key's secret.

Actors: `platform:<key id>` and `key:<key id>` over HTTP, `command:<user>` for `bespoke …`, `system` for
the service itself.
"""

import getpass
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from serve.storage.database import RowId, Store, UtcDateTime, metadata

SYSTEM = "system"

audit_table = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", RowId, primary_key=True),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("tenant_id", sa.String(63)),
    sa.Column("subject", sa.String(160), nullable=False),
    sa.Column("details", sa.Text, nullable=False),
    sa.Index("ix_audit_log_tenant_id_id", "tenant_id", "id"),
)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Describes one action. `tenant` is None for an action that concerns all, such as a new price plan."""

    id: int
    at: datetime
    actor: str
    action: str
    tenant: str | None
    subject: str
    details: Mapping[str, Any]


def record(
    connection: sa.Connection,
    action: str,
    subject: str,
    details: Mapping[str, Any] | None = None,
    *,
    actor: str,
    tenant: str | None = None,
    at: datetime | None = None,
) -> None:
    """Record in the caller's transaction that `actor` did `action` (such as `key.create`) to `subject`."""
    row = {"actor": actor[:128], "action": action, "tenant_id": tenant, "subject": subject}
    document = json.dumps(details or {}, sort_keys=True, default=_json_value)
    connection.execute(audit_table.insert().values(**row, at=at or datetime.now(UTC), details=document))


class Audit:
    """Reads the audit log of one store. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def entries(
        self,
        *,
        tenant: str | None = None,
        action: str | None = None,
        before: int | None = None,
        limit: int = 20,
    ) -> list[AuditEntry]:
        """Return at most `limit` entries older than the entry `before`, newest first."""
        c = audit_table.c
        query = sa.select(audit_table).order_by(c.id.desc()).limit(limit)
        if tenant is not None:
            query = query.where(c.tenant_id == tenant)
        if action is not None:
            query = query.where(c.action == action)
        if before is not None:
            query = query.where(c.id < before)
        with self._store.read() as connection:
            return [_entry(row) for row in connection.execute(query)]


def command_actor() -> str:
    """Return the actor of a `bespoke …` command: the operating system's user."""
    try:
        return f"command:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user may have no name
        return f"command:{os.getuid()}"


def _json_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in the audit log")


def _entry(row: sa.Row[Any]) -> AuditEntry:
    details = json.loads(row.details)
    return AuditEntry(row.id, row.at, row.actor, row.action, row.tenant_id, row.subject, details)
