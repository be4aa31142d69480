"""Tenants and their API keys.

A key is shown once, at creation; the store keeps HMAC-SHA-256(server secret, key), so a stolen
database neither yields keys nor lets anyone test guesses without the secret
(RFC 2104; keys carry 256 bits of randomness, so a slow password hash would add nothing).
"""

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from finetune.card import validate_name
from serve.db import Store, UtcDateTime, metadata
from serve.errors import AlreadyExists, Unauthenticated, UnknownRecord

KEY_PREFIX = "bsk-"
KEY_LENGTH_MAX = 128
SCOPES = frozenset({"inference", "billing-read"})

tenants_table = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
)

keys_table = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("hint", sa.String(16), nullable=False),
    sa.Column("scopes", sa.String(255), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("revoked_at", UtcDateTime),
)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking: the outcome of a successful authentication."""

    tenant: str
    key_id: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it can be shown again: `hint` is its last four characters."""

    id: str
    tenant: str
    hint: str
    scopes: frozenset[str]
    created_at: datetime
    revoked_at: datetime | None


def server_secret(home: Path) -> bytes:
    """The secret that hashes keys, created on first use, readable by its owner only."""
    path = home / "secret"
    home.mkdir(parents=True, exist_ok=True)
    staged = home / f".secret-{os.getpid()}-{secrets.token_hex(4)}"
    if not path.exists():
        with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_hex(32).encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(staged, path)  # fails if another process was first; its secret is the one
        except FileExistsError:
            pass
        finally:
            staged.unlink()
    return path.read_bytes()


class Tenants:
    """The tenants of one store. Methods block; they raise StoreUnavailable if the store is away."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = store
        self._secret = secret

    def _digest(self, key: str) -> str:
        return hmac.new(self._secret, key.encode(), hashlib.sha256).hexdigest()

    def create(self, tenant: str, *, at: datetime) -> None:
        """Raises InvalidName for a bad name, AlreadyExists for a taken one."""
        validate_name(tenant)
        try:
            with self._store.write() as connection:
                connection.execute(tenants_table.insert().values(id=tenant, created_at=at))
        except sa.exc.IntegrityError as error:
            raise AlreadyExists(f"The tenant '{tenant}' exists already.") from error

    def names(self) -> list[str]:
        with self._store.read() as connection:
            return list(connection.execute(sa.select(tenants_table.c.id).order_by("id")).scalars())

    def create_key(
        self, tenant: str, *, at: datetime, scopes: frozenset[str] = frozenset({"inference"})
    ) -> tuple[ApiKey, str]:
        """A new key and its secret; the secret is not kept and cannot be shown again.

        Raises UnknownRecord for an unknown tenant, ValueError for an unknown scope.
        """
        if unknown := scopes - SCOPES:
            raise ValueError(f"unknown scopes: {', '.join(sorted(unknown))}")
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        key = ApiKey(f"key_{secrets.token_hex(8)}", tenant, secret[-4:], scopes, at, None)
        row = {
            "id": key.id,
            "tenant_id": tenant,
            "digest": self._digest(secret),
            "hint": key.hint,
            "scopes": " ".join(sorted(scopes)),
            "created_at": at,
        }
        try:
            with self._store.write() as connection:
                connection.execute(keys_table.insert().values(row))
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{tenant}'.") from error
        return key, secret

    def revoke_key(self, key_id: str, *, at: datetime) -> None:
        """Raises UnknownRecord if there is no such key; revoking twice keeps the first time."""
        with self._store.write() as connection:
            known = keys_table.c.id == key_id
            if connection.execute(sa.select(keys_table.c.id).where(known)).first() is None:
                raise UnknownRecord(f"There is no key '{key_id}'.")
            connection.execute(
                keys_table.update().where(known, keys_table.c.revoked_at.is_(None)).values(revoked_at=at)
            )

    def keys(self, tenant: str) -> list[ApiKey]:
        query = sa.select(keys_table).where(keys_table.c.tenant_id == tenant).order_by("created_at")
        with self._store.read() as connection:
            return [_key(row) for row in connection.execute(query)]

    def authenticate(self, key: str) -> Principal:
        """Raises Unauthenticated for anything but a live key.

        The look-up is by digest, so its time tells nothing about how close a guess was.
        """
        if not key.startswith(KEY_PREFIX) or len(key) > KEY_LENGTH_MAX:
            raise Unauthenticated()
        query = sa.select(keys_table).where(keys_table.c.digest == self._digest(key))
        with self._store.read() as connection:
            row = connection.execute(query).first()
        if row is None or row.revoked_at is not None:
            raise Unauthenticated()
        return Principal(row.tenant_id, row.id, frozenset(row.scopes.split()))


def _key(row: "sa.Row[tuple[object, ...]]") -> ApiKey:
    return ApiKey(
        row.id, row.tenant_id, row.hint, frozenset(row.scopes.split()), row.created_at, row.revoked_at
    )
