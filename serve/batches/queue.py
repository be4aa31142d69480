"""Hands batches to workers: a worker takes one with a lease, changes its status, and ends it.

Taking a batch is a conditional UPDATE. Every later change is conditional on the lease, so each step happens
once, even if workers die or come late.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.batches.batches import LIVE, Batch, BatchStatus, LineError, batches_table, find, results_table
from serve.client_data.files import File, Files
from serve.storage.database import Store


class BatchQueue:
    """Takes and changes batches for the worker `owner`. Methods block and raise StoreUnavailable.

    Methods that change a batch return False if the lease is lost or the batch has another status already.
    """

    def __init__(self, store: Store, files: Files, owner: str, lease: timedelta) -> None:
        self.owner = owner
        self.lease = lease
        self._store = store
        self._files = files

    def take(self, *, at: datetime) -> Batch | None:
        """Lease an unfinished batch of the tenant with the fewest leased batches. None if there is none."""
        c, others = batches_table.c, batches_table.alias().c
        free = sa.or_(c.lease_owner.is_(None), c.lease_expires_at <= at)
        leased = sa.select(sa.func.count()).where(
            others.tenant_id == c.tenant_id, others.lease_owner.is_not(None), others.lease_expires_at > at
        )
        query = sa.select(c.id).where(c.status.in_(LIVE), free)
        query = query.order_by(leased.scalar_subquery(), c.created_at, c.id).limit(1)
        while True:
            with self._store.read() as connection:
                batch_id = connection.execute(query).scalar()
            if batch_id is None:
                return None
            taking = batches_table.update().where(c.id == batch_id, c.status.in_(LIVE), free)
            with self._store.write() as connection:
                lease = {"lease_owner": self.owner, "lease_expires_at": at + self.lease}
                if connection.execute(taking.values(lease)).rowcount:
                    return find(connection, batch_id)

    def renew(self, batch_id: str, *, at: datetime) -> BatchStatus | None:
        """Renew the lease. Returns the batch's status; None if the lease is lost."""
        with self._store.write() as connection:
            if not self._set(connection, batch_id, LIVE, lease_expires_at=at + self.lease):
                return None
            query = sa.select(batches_table.c.status).where(batches_table.c.id == batch_id)
            return BatchStatus(connection.execute(query).scalar_one())

    def release(self, batch_id: str) -> bool:
        """End the lease, so that the next worker can take the batch at once."""
        with self._store.write() as connection:
            return self._set(connection, batch_id, LIVE, lease_owner=None, lease_expires_at=None)

    def begin(self, batch_id: str, *, lines: int, at: datetime) -> bool:
        """Start the lines: the input is valid."""
        values = {"status": BatchStatus.IN_PROGRESS.value, "in_progress_at": at, "lines": lines}
        with self._store.write() as connection:
            return self._set(connection, batch_id, (BatchStatus.VALIDATING.value,), **values)

    def fail(self, batch_id: str, errors: Sequence[LineError], *, at: datetime) -> bool:
        """End the batch: the input is not valid, and none of its lines runs."""
        line_errors = json.dumps([asdict(error) for error in errors])
        values = {
            "status": BatchStatus.FAILED.value,
            "failed_at": at,
            "errors": line_errors,
            "lease_owner": None,
        }
        with self._store.write() as connection:
            return self._set(connection, batch_id, (BatchStatus.VALIDATING.value,), **values)

    def finalize(self, batch_id: str, *, at: datetime) -> bool:
        """Start no more lines: all are done, or the batch's time is over."""
        values = {"status": BatchStatus.FINALIZING.value, "finalizing_at": at}
        with self._store.write() as connection:
            return self._set(connection, batch_id, (BatchStatus.IN_PROGRESS.value,), **values)

    def end(
        self, batch_id: str, status: BatchStatus, *, output: File | None, errors: File | None, at: datetime
    ) -> bool:
        """Store the last status and the files, whose bytes are on disk already, in one transaction."""
        before = BatchStatus.CANCELLING if status is BatchStatus.CANCELLED else BatchStatus.FINALIZING
        with self._store.write() as connection:
            if not self._set(connection, batch_id, (before.value,), lease_expires_at=at):  # and locks it
                return False
            for file in (output, errors):
                if file is not None:
                    self._files.insert(connection, file)
            ended = {
                "status": status.value,
                f"{status.value}_at": at,
                "output_file_id": output.id if output else None,
                "error_file_id": errors.id if errors else None,
                "lease_owner": None,
            }
            self._set(connection, batch_id, (before.value,), **ended)
            # The answers are in the tenant's files now. They must be gone once the tenant deletes the files.
            results = results_table.update().where(results_table.c.batch_id == batch_id)
            connection.execute(results.values(body=None))
            return True

    def _set(self, connection: sa.Connection, batch_id: str, before: Sequence[str], **values: Any) -> bool:
        c = batches_table.c
        leased = (c.id == batch_id, c.lease_owner == self.owner, c.status.in_(before))
        return connection.execute(batches_table.update().where(*leased).values(values)).rowcount == 1
