"""Stores batches: files of requests that run within a day, when there is capacity.

    validating → in_progress → finalizing → completed | expired
        ↓             ↓
      failed      cancelling → cancelled

This module has the tenant's operations. `queue.py` has the worker's, `lines.py` those on single lines.
"""

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from serve.client_data.files import Files, lock_tenant
from serve.errors import Conflict, InvalidRequest, NotFound
from serve.storage.database import Store, UtcDateTime, metadata
from serve.storage.pagination import Page, page

WINDOW, WINDOW_NAME = timedelta(hours=24), "24h"
ERRORS_MAX = 64  # that a batch lists


class BatchStatus(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


LIVE = tuple(
    f"{s}"
    for s in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING)
)
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
OK = 200

batches_table = sa.Table(
    "batches",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("key_id", sa.ForeignKey("api_keys.id"), nullable=False),
    sa.Column("endpoint", sa.String(32), nullable=False),
    sa.Column("input_file_id", sa.ForeignKey("files.id"), nullable=False),
    sa.Column("completion_window", sa.String(8), nullable=False),
    sa.Column("metadata", sa.Text),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("errors", sa.Text),
    sa.Column("lines", sa.Integer, nullable=False),
    sa.Column("output_file_id", sa.ForeignKey("files.id")),
    sa.Column("error_file_id", sa.ForeignKey("files.id")),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False),
    *(sa.Column(f"{status}_at", UtcDateTime) for status in TIMES),
    sa.Column("lease_owner", sa.String(64)),
    sa.Column("lease_expires_at", UtcDateTime),
    sa.CheckConstraint(f"status IN {tuple(status.value for status in BatchStatus)}", name="status_known"),
    sa.Index("ix_batches_tenant_id_created_at", "tenant_id", "created_at"),
)

results_table = sa.Table(
    "batch_results",
    metadata,
    sa.Column("batch_id", sa.ForeignKey("batches.id"), primary_key=True),
    sa.Column("line", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("custom_id", sa.String(512), nullable=False),
    sa.Column("request_id", sa.String(64), nullable=False, unique=True),
    sa.Column("status_code", sa.SmallInteger),
    sa.Column("body", sa.Text),
)


@dataclass(frozen=True, slots=True)
class LineError:
    """An error in an input file; `line` counts from 1, None means the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch. `lines` is its number of requests, 0 before validation; `times` has each status's time."""

    id: str
    tenant: str
    key_id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    status: BatchStatus
    errors: tuple[LineError, ...]
    lines: int
    output_file_id: str | None
    error_file_id: str | None
    created_at: datetime
    expires_at: datetime
    completed: int = 0
    failed: int = 0
    times: Mapping[str, datetime | None] = field(default_factory=dict)


class Batches:
    """The batches of one store. Methods block and raise StoreUnavailable.

    A method that is given a tenant finds that tenant's batches only.
    """

    def __init__(self, store: Store, files: Files, *, per_tenant: int) -> None:
        self._store = store
        self._files = files
        self._per_tenant = per_tenant

    def create(
        self,
        tenant: str,
        key_id: str,
        *,
        endpoint: str,
        input_file_id: str,
        metadata: dict[str, str] | None,
        at: datetime,
    ) -> Batch:
        """Create a batch, to be validated.

        Raises NotFound for the file, InvalidRequest if it cannot be a batch's input, Conflict if the tenant
        has too many unfinished batches.
        """
        batch_id = f"batch_{secrets.token_hex(16)}"
        c, expires_at = batches_table.c, at + WINDOW
        with self._store.write() as connection:
            lock_tenant(connection, tenant)
            file = self._files.find(connection, tenant, input_file_id, at=at)
            if file.purpose != "batch":
                raise _wrong_file("The input file must have been uploaded with purpose 'batch'.")
            if file.expires_at is not None and file.expires_at < expires_at:
                raise _wrong_file("The input file expires before the batch does.")
            unfinished = sa.select(sa.func.count()).where(c.tenant_id == tenant, c.status.in_(LIVE))
            if connection.execute(unfinished).scalar_one() >= self._per_tenant:
                raise Conflict(f"You may have {self._per_tenant} unfinished batches at once.")
            connection.execute(
                batches_table.insert().values(
                    id=batch_id,
                    tenant_id=tenant,
                    key_id=key_id,
                    endpoint=endpoint,
                    input_file_id=input_file_id,
                    completion_window=WINDOW_NAME,
                    metadata=None if metadata is None else json.dumps(metadata),
                    status=BatchStatus.VALIDATING.value,
                    lines=0,
                    created_at=at,
                    expires_at=expires_at,
                )
            )
            return find(connection, batch_id, tenant)

    def get(self, tenant: str, batch_id: str) -> Batch:
        """Raises NotFound, with the same message for another tenant's batch."""
        with self._store.read() as connection:
            return find(connection, batch_id, tenant)

    def page(self, tenant: str, *, after: str | None = None, limit: int) -> Page[Batch]:
        """Newest first. Raises InvalidRequest if `after` is not a batch of the tenant."""
        of_tenant = batches_table.c.tenant_id == tenant
        with self._store.read() as connection:
            rows = page(connection, batches_table, of_tenant, after=after, limit=limit, newest_first=True)
            return Page(_batches(connection, rows.items), rows.has_more)

    def cancel(self, tenant: str, batch_id: str, *, at: datetime) -> Batch:
        """Start no more of its lines. Idempotent. Raises NotFound, Conflict for a batch that has ended."""
        c = batches_table.c
        with self._store.write() as connection:
            changed = connection.execute(
                batches_table.update()
                .where(
                    c.id == batch_id,
                    c.tenant_id == tenant,
                    c.status.in_((BatchStatus.VALIDATING.value, BatchStatus.IN_PROGRESS.value)),
                )
                .values(status=BatchStatus.CANCELLING.value, cancelling_at=at)
            )
            batch = find(connection, batch_id, tenant)
            if not changed.rowcount and batch.status not in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                raise Conflict(f"A batch that is {batch.status.value} cannot be cancelled.")
            return batch

    def readers(self, file_id: str) -> "sa.Select[Any]":
        """Selects the batches that still need the file; see `Files.delete`."""
        c = batches_table.c
        return sa.select(c.id).where(c.input_file_id == file_id, c.status.in_(LIVE))


def find(connection: sa.Connection, batch_id: str, tenant: str | None = None) -> Batch:
    """Raises NotFound, with the same message for another tenant's batch."""
    query = sa.select(batches_table).where(batches_table.c.id == batch_id)
    if tenant is not None:
        query = query.where(batches_table.c.tenant_id == tenant)
    row = connection.execute(query).first() if batch_id.isprintable() else None
    if row is None:
        raise NotFound(f"No such batch: {batch_id[:64]}.")
    return _batches(connection, [row])[0]


def _batches(connection: sa.Connection, rows: Iterable["sa.Row[Any]"]) -> list[Batch]:
    """The batches of `rows`, with the numbers of their completed and failed lines."""
    rows, c = list(rows), results_table.c
    completed = sa.func.sum(sa.case((c.status_code == OK, 1), else_=0))
    query = (
        sa.select(c.batch_id, completed, sa.func.count(c.status_code))
        .where(c.batch_id.in_([row.id for row in rows]))
        .group_by(c.batch_id)
    )
    counts = {batch_id: (int(ok), int(ended)) for batch_id, ok, ended in connection.execute(query)}
    return [_batch(row, *counts.get(row.id, (0, 0))) for row in rows]


def _batch(row: "sa.Row[Any]", completed: int, ended: int) -> Batch:
    return Batch(
        id=row.id,
        tenant=row.tenant_id,
        key_id=row.key_id,
        endpoint=row.endpoint,
        input_file_id=row.input_file_id,
        completion_window=row.completion_window,
        metadata=None if row.metadata is None else json.loads(row.metadata),
        status=BatchStatus(row.status),
        errors=tuple(LineError(**error) for error in json.loads(row.errors or "[]")),
        lines=row.lines,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        created_at=row.created_at,
        expires_at=row.expires_at,
        completed=completed,
        failed=ended - completed,
        times={name: getattr(row, f"{name}_at") for name in TIMES},
    )


def _wrong_file(message: str) -> InvalidRequest:
    return InvalidRequest(message, "input_file_id", "invalid_input_file")
