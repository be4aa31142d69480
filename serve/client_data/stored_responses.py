"""Stores the answers of `POST /v1/responses`, for later reading and for the next turn.

Each row holds the response and its full context (the items of its own input and of the turns before it). So
the next turn reads one row, and a conversation survives the deletion of its earlier responses. Each tenant
has bounds on number and bytes; beyond them its oldest responses are deleted. The tenant's row in
`response_shelves` counts both, and is locked while its responses are inserted or deleted.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.errors import ResponseNotFound
from serve.inference.request import GenerationResult
from serve.storage.database import Store, UtcDateTime, metadata

log = logging.getLogger(__name__)

RETENTION = timedelta(days=30)
RESPONSES_MAX = 10_000
BYTES_MAX = 256 * 1024 * 1024
_STEP = 100  # rows per step of an eviction or a sweep

Json = dict[str, Any]

responses_table = sa.Table(
    "responses",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("request_id", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False, index=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("context", sa.Text, nullable=False),
    sa.Index("ix_responses_tenant_id_created_at_id", "tenant_id", "created_at", "id"),
)

shelves_table = sa.Table(
    "response_shelves",
    metadata,
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("responses", sa.BigInteger, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.CheckConstraint("responses >= 0", name="responses_not_negative"),
    sa.CheckConstraint("bytes >= 0", name="bytes_not_negative"),
)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response object and its context: the items that it answered, oldest first."""

    body: Json
    context: list[Json]

    @property
    def conversation(self) -> list[Json]:
        """The context of the next turn."""
        return [*self.context, *self.body["output"]]


class StoredResponses:
    """The stored responses of one store. Methods block and raise StoreUnavailable."""

    def __init__(
        self, store: Store, *, responses_max: int = RESPONSES_MAX, bytes_max: int = BYTES_MAX
    ) -> None:
        self._store = store
        self._responses_max = responses_max
        self._bytes_max = bytes_max

    def insert(
        self, connection: sa.Connection, tenant: str, request_id: str, stored: StoredResponse, *, at: datetime
    ) -> None:
        """Store it in the caller's write transaction. Beyond the bounds the tenant's oldest are deleted."""
        body, context = _text(stored.body), _text(stored.context)
        size = len(body) + len(context)
        responses, total = _lock(connection, tenant)
        connection.execute(
            responses_table.insert().values(
                id=stored.body["id"],
                tenant_id=tenant,
                request_id=request_id,
                created_at=at,
                expires_at=at + RETENTION,
                bytes=size,
                body=body.decode(),
                context=context.decode(),
            )
        )
        responses, total = responses + 1, total + size
        c = responses_table.c
        oldest = (
            sa.select(c.id, c.bytes)
            .where(c.tenant_id == tenant, c.id != stored.body["id"])
            .order_by(c.created_at, c.id)
            .limit(_STEP)
        )
        while responses > self._responses_max or total > self._bytes_max:
            evicted = []
            for old in connection.execute(oldest):
                if responses <= self._responses_max and total <= self._bytes_max:
                    break
                evicted.append(old.id)
                responses, total = responses - 1, total - old.bytes
            if not evicted:  # the new response alone is too large: it stays until the next one comes
                break
            connection.execute(responses_table.delete().where(c.id.in_(evicted)))
        _write(connection, tenant, responses, total)

    def store(self, tenant: str, request_id: str, stored: StoredResponse, *, at: datetime) -> None:
        """`insert` in a transaction of its own."""
        with self._store.write() as connection:
            self.insert(connection, tenant, request_id, stored, at=at)

    def find(self, tenant: str, response_id: str, *, at: datetime) -> StoredResponse:
        """Raises ResponseNotFound if the id is unknown, another tenant's or expired."""
        c = responses_table.c
        query = sa.select(c.body, c.context).where(
            c.id == response_id, c.tenant_id == tenant, c.expires_at > at
        )
        with self._store.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise ResponseNotFound(response_id)
        return StoredResponse(json.loads(row.body), json.loads(row.context))

    def items(self, tenant: str, response_ids: Mapping[str, str], *, at: datetime) -> dict[str, Json]:
        """The tenant's items of these ids, each with the response it belongs to; those that are there.

        Mostly they are of answers, which are small: a context is read only if an id is not among them.
        """
        c = responses_table.c
        live = (c.id.in_(set(response_ids.values())), c.tenant_id == tenant, c.expires_at > at)
        items: dict[str, Json] = {}

        def take(candidates: Iterable[Json]) -> None:
            items.update({item["id"]: item for item in candidates if item["id"] in response_ids})

        with self._store.read() as connection:
            for row in connection.execute(sa.select(c.body).where(*live)):
                take(json.loads(row.body)["output"])
            missing = {response_ids[item_id] for item_id in response_ids.keys() - items.keys()}
            for row in connection.execute(sa.select(c.context).where(c.id.in_(missing), *live)):
                take(json.loads(row.context))
        return items

    def delete(self, tenant: str, response_id: str, *, at: datetime) -> None:
        """Delete one. Later turns of its conversation have their own copy. Raises ResponseNotFound."""
        c = responses_table.c
        with self._store.write() as connection:
            live = (c.id == response_id, c.tenant_id == tenant, c.expires_at > at)
            if not _remove(connection, tenant, *live):
                raise ResponseNotFound(response_id)

    def sweep(self, *, at: datetime) -> int:
        """Delete expired responses. Returns their number; any process may call it."""
        c = responses_table.c
        count = 0
        with self._store.read() as connection:
            expired = sa.select(c.tenant_id).where(c.expires_at <= at).distinct()
            tenants = list(connection.execute(expired).scalars())
        for tenant in tenants:
            # In steps, so that no step delays a settlement for long.
            expired_ids = sa.select(c.id).where(c.tenant_id == tenant, c.expires_at <= at).limit(_STEP)
            removed = _STEP
            while removed == _STEP:
                with self._store.write() as connection:
                    removed = _remove(connection, tenant, c.id.in_(expired_ids))
                count += removed
        return count


class ResponseCommitHook:
    """Stores a complete answer with its settlement; a `serve.inference.request.CommitHook`.

    render: makes the response of a generation. `stored` is the stored response, None if storing failed:
    such a failure must not keep the answer from being billed.
    """

    def __init__(
        self, responses: StoredResponses, tenant: str, render: Callable[[GenerationResult], StoredResponse]
    ) -> None:
        self.stored: StoredResponse | None = None
        self._responses = responses
        self._tenant = tenant
        self._render = render

    def on_hold(self, connection: sa.Connection, at: datetime) -> None:
        """Nothing: the response is stored once it exists."""

    def on_settle(self, connection: sa.Connection, result: GenerationResult) -> None:
        at, request_id = result.created_at, result.request.request_id
        try:
            with connection.begin_nested():
                stored = self._render(result)
                self._responses.insert(connection, self._tenant, request_id, stored, at=at)
        except (sa.exc.OperationalError, sa.exc.InterfaceError):
            raise  # the store cannot be reached, for the settlement either, which is retried
        except Exception:
            log.exception("response of %s is not stored", request_id)
        else:
            self.stored = stored

    def on_void(self, connection: sa.Connection) -> None:
        """Nothing was claimed."""


def _text(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _lock(connection: sa.Connection, tenant: str) -> tuple[int, int]:
    """The tenant's number of responses and their bytes, locked until the transaction ends."""
    c = shelves_table.c
    query = sa.select(c.responses, c.bytes).where(c.tenant_id == tenant).with_for_update()
    row = connection.execute(query).first()
    if row is None:
        new = "INSERT INTO response_shelves (tenant_id, responses, bytes) VALUES (:tenant, 0, 0)"
        connection.execute(sa.text(f"{new} ON CONFLICT DO NOTHING"), {"tenant": tenant})
        row = connection.execute(query).one()
    return row.responses, row.bytes


def _write(connection: sa.Connection, tenant: str, responses: int, size: int) -> None:
    of_tenant = shelves_table.c.tenant_id == tenant
    connection.execute(shelves_table.update().where(of_tenant).values(responses=responses, bytes=size))


def _remove(connection: sa.Connection, tenant: str, *where: sa.ColumnElement[bool]) -> int:
    """Delete the tenant's matching responses, and count them off. Returns their number."""
    responses, size = _lock(connection, tenant)
    c = responses_table.c
    rows = connection.execute(sa.select(c.id, c.bytes).where(*where)).all()
    if rows:
        connection.execute(responses_table.delete().where(c.id.in_([row.id for row in rows])))
        _write(connection, tenant, responses - len(rows), size - sum(row.bytes for row in rows))
    return len(rows)
