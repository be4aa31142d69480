"""Idempotency keys: a request that is sent again gets the answer of the first, which is billed once.

The first request claims its key with its hold, and its answer is kept with its settlement, each in one
transaction; so no crash can bill an answer that a retry would not get. Keys belong to a tenant, are kept as
hashes and for a day. stripe.com/docs/api/idempotent_requests, draft-ietf-httpapi-idempotency-key-header.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.errors import IdempotencyConflict, InvalidRequest
from serve.inference.request import GenerationResult
from serve.storage.database import Store, UtcDateTime, metadata

KEPT_FOR = timedelta(hours=24)
KEY_CHARS_MAX = 255

idempotency_table = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("request_id", sa.String(64), nullable=False, index=True),
    sa.Column("body", sa.Text),
    sa.Column("expires_at", UtcDateTime, nullable=False, index=True),
)


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """A finished request's id and answer (JSON text)."""

    request_id: str
    body: str


class Idempotency:
    """The keys of one store. `lease` is how long a request may take; then its key is free again."""

    def __init__(self, store: Store, *, lease: timedelta) -> None:
        self._store = store
        self.lease = lease

    def find(self, tenant: str, key: str, content: bytes, *, at: datetime) -> StoredAnswer | None:
        """The kept answer of the first request with this key; None if it may run now.

        Raises InvalidRequest if the key is too long or was used with another request, IdempotencyConflict
        while the first one runs.
        """
        if not 0 < len(key) <= KEY_CHARS_MAX:
            raise InvalidRequest(
                f"An Idempotency-Key has between 1 and {KEY_CHARS_MAX} characters.", "Idempotency-Key"
            )
        c = idempotency_table.c
        query = sa.select(idempotency_table).where(
            c.tenant_id == tenant, c.digest == _sha256(key.encode()), c.expires_at > at
        )
        with self._store.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        if row.fingerprint != _sha256(content):
            raise InvalidRequest(
                "This Idempotency-Key was used with a different request.",
                "Idempotency-Key",
                "idempotency_key_reused",
            )
        if row.body is None:
            raise IdempotencyConflict()
        return StoredAnswer(row.request_id, row.body)

    def commit_hook(
        self,
        tenant: str,
        key: str,
        content: bytes,
        request_id: str,
        render: Callable[[GenerationResult], str],
    ) -> "IdempotencyCommitHook":
        """Keeps the answer of a request under `key`; `render` makes the JSON text of it."""
        row = {
            "tenant_id": tenant,
            "digest": _sha256(key.encode()),
            "fingerprint": _sha256(content),
            "request_id": request_id,
        }
        return IdempotencyCommitHook(row, self.lease, render)

    def sweep(self, *, at: datetime) -> int:
        """Forget what has expired. Returns how many."""
        with self._store.write() as connection:
            return connection.execute(
                idempotency_table.delete().where(idempotency_table.c.expires_at <= at)
            ).rowcount


class IdempotencyCommitHook:
    """See `serve.inference.request.Keeper`."""

    def __init__(
        self, row: dict[str, str], lease: timedelta, render: Callable[[GenerationResult], str]
    ) -> None:
        self._row = row
        self._lease = lease
        self._render = render
        self._claimed_at: datetime | None = None

    def on_hold(self, connection: sa.Connection, at: datetime) -> None:
        """Raises IdempotencyConflict if another request has the key."""
        self._claimed_at = at
        c, row = idempotency_table.c, self._row
        same = (c.tenant_id == row["tenant_id"], c.digest == row["digest"])
        connection.execute(idempotency_table.delete().where(*same, c.expires_at <= at))
        try:
            with connection.begin_nested():
                connection.execute(idempotency_table.insert().values(**row, expires_at=at + self._lease))
        except sa.exc.IntegrityError as error:
            raise IdempotencyConflict() from error

    def on_settle(self, connection: sa.Connection, result: GenerationResult) -> None:
        assert self._claimed_at is not None
        values = {"body": self._render(result), "expires_at": self._claimed_at + KEPT_FOR}
        connection.execute(idempotency_table.update().where(self._own).values(values))

    def on_void(self, connection: sa.Connection) -> None:
        release_key(connection, self._row["request_id"])

    @property
    def _own(self) -> sa.ColumnElement[bool]:
        return idempotency_table.c.request_id == self._row["request_id"]


def release_key(connection: sa.Connection, request_id: str) -> None:
    """The key of a request that has no answer to keep is free again."""
    c = idempotency_table.c
    connection.execute(idempotency_table.delete().where(c.request_id == request_id, c.body.is_(None)))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
