"""Tenants are the service's customers. Their projects and keys are reached through them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from finetune.card import validate_name
from serve.errors import AlreadyExists, UnknownRecord
from serve.rate_limits.limits import Limits, LimitStore
from serve.storage.database import Store
from serve.storage.pagination import Page, page
from serve.tenants.audit import SYSTEM, record
from serve.tenants.key_cache import KeyCache, utc_now
from serve.tenants.keys import SCOPES, ApiKey, Keys, Principal, read_scopes
from serve.tenants.platform_keys import Operator, PlatformKeys
from serve.tenants.projects import Projects
from serve.tenants.tables import tenants_table


@dataclass(frozen=True, slots=True)
class Tenant:
    """Describes a tenant. `scopes` are the most that its keys may have."""

    id: str
    created_at: datetime
    suspended_at: datetime | None
    scopes: frozenset[str]
    limits: Limits


class Tenants:
    """Manages the tenants of one store. Methods block and raise StoreUnavailable.

    `key_cache` and `platform_key_cache` cache the owners of keys for a second; see `key_cache.py`.
    """

    def __init__(
        self,
        store: Store,
        secret: bytes,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = store
        self._limits = LimitStore(store)
        self.projects = Projects(store)
        self.keys = Keys(store, secret)
        self.platform_keys = PlatformKeys(store, secret)
        self.key_cache: KeyCache[Principal] = KeyCache(self.keys, clock_s=clock_s, now=now)
        self.platform_key_cache: KeyCache[Operator] = KeyCache(self.platform_keys, clock_s=clock_s, now=now)

    def create(self, tenant: str, *, at: datetime, actor: str = SYSTEM) -> None:
        """Create a tenant. Raises InvalidName for a bad name, AlreadyExists for a taken one."""
        validate_name(tenant)
        try:
            with self._store.write() as connection:
                connection.execute(tenants_table.insert().values(id=tenant, created_at=at))
                record(connection, "tenant.create", tenant, actor=actor, tenant=tenant, at=at)
        except sa.exc.IntegrityError as error:
            raise AlreadyExists(f"The tenant '{tenant}' exists already.") from error

    def names(self) -> list[str]:
        with self._store.read() as connection:
            return list(connection.execute(sa.select(tenants_table.c.id).order_by("id")).scalars())

    def get(self, tenant: str) -> Tenant:
        """Raises UnknownRecord."""
        with self._store.read() as connection:
            return self._get(connection, tenant)

    def page(self, *, after: str | None = None, limit: int | None = None) -> Page[Tenant]:
        """Return the tenants, oldest first. Raises InvalidRequest if `after` is none of them."""
        with self._store.read() as connection:
            rows = page(connection, tenants_table, after=after, limit=limit)
            return Page([self._tenant(connection, row) for row in rows.items], rows.has_more)

    def suspend(self, tenant: str, suspended: bool, *, at: datetime, actor: str = SYSTEM) -> Tenant:
        """Suspend a tenant, which refuses all its keys, or resume it. Idempotent. Raises UnknownRecord."""
        return self.change(tenant, at=at, actor=actor, suspended=suspended)

    def change(
        self,
        tenant: str,
        *,
        at: datetime,
        suspended: bool | None = None,
        scopes: frozenset[str] | None = None,
        limits: Mapping[str, Any] | None = None,
        actor: str = SYSTEM,
    ) -> Tenant:
        """Suspend or resume a tenant, set the scopes its keys may have, and change the limits that are named.

        All changes happen in one transaction. A limit of None is removed. Raises UnknownRecord, or
        ValueError for an unknown scope.
        """
        if unknown := (scopes or frozenset()) - SCOPES:
            raise ValueError(f"unknown scopes: {', '.join(sorted(unknown))}")
        update = tenants_table.update().where(tenants_table.c.id == tenant)
        with self._store.write() as connection:

            def record_change(action: str, details: Mapping[str, Any] | None = None) -> None:
                record(connection, action, tenant, details, actor=actor, tenant=tenant, at=at)

            before = self._get(connection, tenant, for_update=True)
            if suspended is not None and suspended != (before.suspended_at is not None):
                connection.execute(update.values(suspended_at=at if suspended else None))
                record_change("tenant.suspend" if suspended else "tenant.resume")
            if scopes is not None and scopes != before.scopes:
                connection.execute(update.values(scopes=" ".join(sorted(scopes))))
                record_change("tenant.scopes", {"scopes": scopes})
            if limits:
                changed_limits = replace(before.limits, **limits)
                self._limits.set(connection, "tenant", tenant, changed_limits, at=at)
                record_change("tenant.limits", asdict(changed_limits))
            return self._get(connection, tenant)

    def create_key(
        self, tenant: str, *, at: datetime, scopes: frozenset[str] = frozenset({"inference"})
    ) -> tuple[ApiKey, str]:
        """Create a key without a name or limits; see `Keys.create`."""
        return self.keys.create(tenant, at=at, scopes=scopes)

    def revoke_key(self, key_id: str, *, at: datetime) -> None:
        """Revoke a key; see `Keys.revoke`."""
        self.keys.revoke(key_id, at=at)

    def _get(self, connection: sa.Connection, tenant: str, *, for_update: bool = False) -> Tenant:
        query = sa.select(tenants_table).where(tenants_table.c.id == tenant)
        row = connection.execute(query.with_for_update() if for_update else query).first()
        if row is None:
            raise UnknownRecord(f"There is no tenant '{tenant}'.")
        return self._tenant(connection, row)

    def _tenant(self, connection: sa.Connection, row: sa.Row[Any]) -> Tenant:
        limits = self._limits.of(connection, "tenant", row.id)
        return Tenant(row.id, row.created_at, row.suspended_at, read_scopes(row.scopes), limits)
