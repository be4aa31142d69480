"""Stores answers under idempotency keys: a repeated request gets the first answer, which is billed once.

The first request claims its key with its hold, and its answer is stored with its settlement, each in one
transaction; so no crash can bill an answer that a retry would not get. Keys belong to a tenant, and are
stored as hashes for a day. stripe.com/docs/api/idempotent_requests,
draft-ietf-httpapi-idempotency-key-header.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.errors import IdempotencyConflict, InvalidRequest
from serve.inference.request import GenerationResult
from serve.storage.database import Store, UtcDateTime, metadata

RETENTION = timedelta(hours=24)
KEY_CHARS_MAX = 255
# OpenAI's and Anthropic's clients obey a Retry-After up to a minute, and try two more times by default.
RETRY_AFTER_S_MAX = 60

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
    """Finds and claims the keys of one store.

    lease: how long a request may take; after that its key is free again.
    """

    def __init__(self, store: Store, *, lease: timedelta) -> None:
        self._store = store
        self.lease = lease

    def find(self, tenant: str, key: str, content: bytes, *, at: datetime) -> StoredAnswer | None:
        """The stored answer of the first request with this key; None if the request may run now.

        Raises InvalidRequest if the key is too long or was used with another request, IdempotencyConflict
        while the first request runs.
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
            raise IdempotencyConflict(retry_after_s(at - (row.expires_at - self.lease), row.expires_at - at))
        return StoredAnswer(row.request_id, row.body)

    def commit_hook(
        self,
        tenant: str,
        key: str,
        content: bytes,
        request_id: str,
        render: Callable[[GenerationResult], str],
    ) -> "IdempotencyCommitHook":
        """The hook that stores a request's answer under `key`; `render` makes its JSON text."""
        row = {
            "tenant_id": tenant,
            "digest": _sha256(key.encode()),
            "fingerprint": _sha256(content),
            "request_id": request_id,
        }
        return IdempotencyCommitHook(row, self.lease, render)

    def sweep(self, *, at: datetime) -> int:
        """Delete expired keys. Returns their number."""
        with self._store.write() as connection:
            return connection.execute(
                idempotency_table.delete().where(idempotency_table.c.expires_at <= at)
            ).rowcount


class IdempotencyCommitHook:
    """Claims a key with the hold, and stores the answer with the settlement; a `CommitHook`."""

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
        same_key = (c.tenant_id == row["tenant_id"], c.digest == row["digest"])
        connection.execute(idempotency_table.delete().where(*same_key, c.expires_at <= at))
        try:
            with connection.begin_nested():
                connection.execute(idempotency_table.insert().values(**row, expires_at=at + self._lease))
        except sa.exc.IntegrityError as error:
            raise IdempotencyConflict() from error

    def on_settle(self, connection: sa.Connection, result: GenerationResult) -> None:
        assert self._claimed_at is not None
        values = {"body": self._render(result), "expires_at": self._claimed_at + RETENTION}
        of_request = idempotency_table.c.request_id == self._row["request_id"]
        connection.execute(idempotency_table.update().where(of_request).values(values))

    def on_void(self, connection: sa.Connection) -> None:
        release_key(connection, self._row["request_id"])


def retry_after_s(elapsed: timedelta, left: timedelta) -> int:
    """The seconds after which the first answer can be there: as long as it has taken so far.

    So the waits double, and a few retries reach the end of a long answer. left: until the key is free again.
    """
    wait_s = min(elapsed.total_seconds(), left.total_seconds(), RETRY_AFTER_S_MAX)
    return max(math.ceil(wait_s), 1)


def release_key(connection: sa.Connection, request_id: str) -> None:
    """Free the key of a request that has no stored answer."""
    c = idempotency_table.c
    connection.execute(idempotency_table.delete().where(c.request_id == request_id, c.body.is_(None)))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
