"""Stores the lines of batches: the attempt in flight on each, and its result.

A line's row is inserted with the hold of its request and filled with the settlement, each in one
transaction (`LineCommitHook`): its bill and its answer are there together or not at all. A row without a
status is an attempt in flight. A worker that takes a batch over first voids such attempts (`Lines.fence`).
The ledger then refuses to settle them, so an earlier worker that was only slow can neither bill nor store
anything.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from serve.batches.batches import OK, BatchStatus, batches_table, results_table
from serve.billing.ledger.accounts import FINAL_PHASE, HOLD_PHASE, transfers_table
from serve.billing.ledger.holds import Hold
from serve.billing.ledger.ledger import Ledger
from serve.formats.response_format import dumps
from serve.inference.request import GenerationResult
from serve.storage.database import Store

Json = dict[str, Any]


class LeaseLost(Exception):
    """The batch was cancelled, or another worker has the batch or the line: no attempt may begin."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one line, by the worker `owner`. Every attempt has its own `request_id`."""

    batch_id: str
    owner: str
    line: int
    custom_id: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Result:
    line: int
    custom_id: str
    request_id: str
    status_code: int
    body: Json


class Lines:
    """The lines of the batches of one store. Methods block and raise StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ledger = Ledger(store)

    def finished_lines(self, batch_id: str) -> set[int]:
        """The numbers of the lines that have a result."""
        c = results_table.c
        query = sa.select(c.line).where(c.batch_id == batch_id, c.status_code.is_not(None))
        with self._store.read() as connection:
            return set(connection.execute(query).scalars())

    def results(self, batch_id: str) -> Iterator[Result]:
        """The results, in the order of the input."""
        c = results_table.c
        query = sa.select(results_table).where(c.batch_id == batch_id, c.status_code.is_not(None))
        with self._store.read() as connection:
            for row in connection.execute(query.order_by(c.line)).yield_per(100):
                yield Result(row.line, row.custom_id, row.request_id, row.status_code, json.loads(row.body))

    def fence(self, batch_id: str, *, at: datetime) -> int:
        """Void the attempts that earlier workers left in flight. Returns their number.

        The batch's worker calls it while it has no attempt in flight itself.
        """
        r, t = results_table.c, transfers_table.c
        query = (
            sa.select(r.request_id, t.tenant_id, t.amount_nanos)
            .join(transfers_table, sa.and_(t.request_id == r.request_id, t.phase == HOLD_PHASE))
            .where(r.batch_id == batch_id, r.status_code.is_(None))
        )
        with self._store.read() as connection:
            holds = [Hold(*row) for row in connection.execute(query)]
        for hold in holds:
            # A hold that is closed already was settled (then the line has its result) or voided by its lease.
            self._ledger.void(hold, "batch taken over", at=at)
            with self._store.write() as connection:
                release_line(connection, hold.request_id)
        return len(holds)

    def refuse(self, attempt: Attempt, status_code: int, body: Json) -> None:
        """Store the failure of a line that was not billed. Raises LeaseLost."""
        with self._store.write() as connection:
            _insert(connection, attempt, status_code=status_code, body=json.dumps(body))


class LineCommitHook:
    """Stores a line's outcome with its bill; a `serve.inference.request.CommitHook`.

    render: makes the body of an answer. failed_body: the body of a line whose answer was cut short.
    """

    def __init__(
        self, attempt: Attempt, render: Callable[[GenerationResult], Json], failed_body: Json
    ) -> None:
        self._attempt = attempt
        self._render = render
        self._failed_body = failed_body

    def on_hold(self, connection: sa.Connection, at: datetime) -> None:
        """Raises LeaseLost."""
        _insert(connection, self._attempt)

    def on_settle(self, connection: sa.Connection, result: GenerationResult) -> None:
        self._fill(connection, OK, self._render(result))

    def on_void(self, connection: sa.Connection) -> None:
        """An answer that was cut short but billed is the line's result: it must not be billed again."""
        t = transfers_table.c
        closing = sa.select(t.kind).where(t.request_id == self._attempt.request_id, t.phase == FINAL_PHASE)
        if connection.execute(closing).scalar() == "settle":
            self._fill(connection, 500, self._failed_body)
        else:
            release_line(connection, self._attempt.request_id)

    def _fill(self, connection: sa.Connection, status_code: int, body: Json) -> None:
        of_attempt = results_table.c.request_id == self._attempt.request_id
        values = {"status_code": status_code, "body": dumps(body).decode()}
        connection.execute(results_table.update().where(of_attempt).values(values))


def _insert(connection: sa.Connection, attempt: Attempt, **outcome: Any) -> None:
    """Raises LeaseLost unless the batch is running, `attempt.owner` has its lease, and the line is free."""
    b = batches_table.c
    # Locked until the transaction ends: a worker that takes the batch over waits, then sees the row to fence.
    owned = sa.select(b.id).where(
        b.id == attempt.batch_id, b.lease_owner == attempt.owner, b.status == BatchStatus.IN_PROGRESS.value
    )
    if connection.execute(owned.with_for_update(read=True)).first() is None:
        raise LeaseLost
    row = {
        "batch_id": attempt.batch_id,
        "line": attempt.line,
        "custom_id": attempt.custom_id,
        "request_id": attempt.request_id,
    }
    try:
        with connection.begin_nested():
            connection.execute(results_table.insert().values(row | outcome))
    except sa.exc.IntegrityError as error:
        raise LeaseLost from error


def release_line(connection: sa.Connection, request_id: str) -> None:
    """Delete the attempt if it has no result, so that the line can be attempted again."""
    c = results_table.c
    connection.execute(results_table.delete().where(c.request_id == request_id, c.status_code.is_(None)))
