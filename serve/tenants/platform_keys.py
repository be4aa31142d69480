"""Platform keys belong to the operator, not to a tenant. They give access only to the admin API."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from serve.errors import InvalidRequest, Unauthenticated, UnknownRecord
from serve.storage.database import Store
from serve.storage.pagination import Page, page
from serve.tenants.audit import SYSTEM, record
from serve.tenants.key_hash import KeyHasher
from serve.tenants.tables import platform_keys_table

PLATFORM_PREFIX = "bsp-"


@dataclass(frozen=True, slots=True)
class Operator:
    """Identifies a caller that authenticated with a platform key."""

    key_id: str

    @property
    def actor(self) -> str:
        return f"platform:{self.key_id}"


@dataclass(frozen=True, slots=True)
class PlatformKey:
    """Describes a platform key without its secret. `hint` is the key's last four characters."""

    id: str
    name: str
    hint: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


class PlatformKeys:
    """Manages the platform keys of one store. Methods block."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = store
        self._hasher = KeyHasher(PLATFORM_PREFIX, secret)

    def create(
        self, name: str, *, at: datetime, expires_at: datetime | None = None, actor: str = SYSTEM
    ) -> tuple[PlatformKey, str]:
        """Create a key. Return it and its secret, which is not stored. Raises InvalidRequest if expired."""
        if expires_at is not None and expires_at <= at:
            raise InvalidRequest("'expires_at' must be in the future.", "expires_at", "invalid_value")
        secret, columns = self._hasher.new()
        key = PlatformKey(f"pkey_{secrets.token_hex(8)}", name, columns["hint"], at, expires_at)
        row = {"id": key.id, "name": name, "created_at": at, "expires_at": expires_at, **columns}
        with self._store.write() as connection:
            connection.execute(platform_keys_table.insert().values(row))
            audit_details = {"name": name, "expires_at": expires_at}
            record(connection, "platform_key.create", key.id, audit_details, actor=actor, at=at)
        return key, secret

    def revoke(self, key_id: str, *, at: datetime, actor: str = SYSTEM) -> PlatformKey:
        """Revoke a key. Revoking twice keeps the first time. Raises UnknownRecord."""
        c = platform_keys_table.c
        query = sa.select(platform_keys_table).where(c.id == key_id)
        with self._store.write() as connection:
            row = connection.execute(query.with_for_update()).first()
            if row is None:
                raise UnknownRecord(f"There is no platform key '{key_id}'.")
            if row.revoked_at is None:
                connection.execute(platform_keys_table.update().where(c.id == key_id).values(revoked_at=at))
                record(connection, "platform_key.revoke", key_id, actor=actor, at=at)
            return _key(connection.execute(query).one())

    def page(self, *, after: str | None = None, limit: int | None = None) -> Page[PlatformKey]:
        """Return the keys, oldest first. Raises InvalidRequest if `after` is none of them."""
        with self._store.read() as connection:
            rows = page(connection, platform_keys_table, after=after, limit=limit)
        return Page([_key(row) for row in rows.items], rows.has_more)

    def digest(self, key: str) -> str:
        return self._hasher.digest(key)

    def find(self, digest: str, at: datetime) -> Operator:
        """Return the key's operator. Raises Unauthenticated unless the key is live."""
        query = sa.select(platform_keys_table).where(platform_keys_table.c.digest == digest)
        with self._store.read() as connection:
            row = connection.execute(query).first()
        if row is None or row.revoked_at is not None or not is_live(row.expires_at, at):
            raise Unauthenticated()
        return Operator(row.id)

    def note_used(self, used: Mapping[str, datetime]) -> None:
        with self._store.write() as connection:
            note_used(connection, platform_keys_table, used)


def is_live(expires_at: datetime | None, at: datetime) -> bool:
    return expires_at is None or at < expires_at


def note_used(connection: sa.Connection, table: sa.Table, used: Mapping[str, datetime]) -> None:
    """Move `last_used_at` forward in one statement. Several gateways may see the same key."""
    c, at = table.c, sa.bindparam("used_at", type_=table.c.last_used_at.type)
    newer = sa.or_(c.last_used_at.is_(None), c.last_used_at < at)
    statement = table.update().where(c.id == sa.bindparam("key"), newer).values(last_used_at=at)
    # Sorted, so that two gateways that write the same keys cannot deadlock.
    connection.execute(statement, [{"key": key, "used_at": used[key]} for key in sorted(used)])


def _key(row: sa.Row[Any]) -> PlatformKey:
    return PlatformKey(
        row.id, row.name, row.hint, row.created_at, row.expires_at, row.revoked_at, row.last_used_at
    )
