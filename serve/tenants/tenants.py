"""Who may use the service: tenants, and through them their projects and keys."""

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
    """`scopes` are all that its keys may have."""

    id: str
    created_at: datetime
    suspended_at: datetime | None
    scopes: frozenset[str]
    limits: Limits


class Tenants:
    """The tenants of one store. Methods block; they raise StoreUnavailable if the store is away.

    `door` and `platform_door` say who a key belongs to, from memory for a second; see `door.py`.
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
        self.platform_door: KeyCache[Operator] = KeyCache(self.platform_keys, clock_s=clock_s, now=now)

    def create(self, tenant: str, *, at: datetime, actor: str = SYSTEM) -> None:
        """Raises InvalidName for a bad name, AlreadyExists for a taken one."""
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
        """Oldest first; raises InvalidRequest if `after` is none of them."""
        with self._store.read() as connection:
            rows = page(connection, tenants_table, after=after, limit=limit)
            return Page([self._tenant(connection, row) for row in rows.items], rows.has_more)

    def suspend(self, tenant: str, suspended: bool, *, at: datetime, actor: str = SYSTEM) -> Tenant:
        """Refuse all of a tenant's keys, or no longer. Idempotent. Raises UnknownRecord."""
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
        """Suspend or resume a tenant, say which scopes its keys may have, change the limits that are named.

        All of it or nothing; a limit of None is lifted.

        Raises UnknownRecord, ValueError for an unknown scope.
        """
        if unknown := (scopes or frozenset()) - SCOPES:
            raise ValueError(f"unknown scopes: {', '.join(sorted(unknown))}")
        mine = tenants_table.update().where(tenants_table.c.id == tenant)
        with self._store.write() as connection:

            def note(action: str, details: Mapping[str, Any] | None = None) -> None:
                record(connection, action, tenant, details, actor=actor, tenant=tenant, at=at)

            before = self._get(connection, tenant, for_update=True)
            if suspended is not None and suspended != (before.suspended_at is not None):
                connection.execute(mine.values(suspended_at=at if suspended else None))
                note("tenant.suspend" if suspended else "tenant.resume")
            if scopes is not None and scopes != before.scopes:
                connection.execute(mine.values(scopes=" ".join(sorted(scopes))))
                note("tenant.scopes", {"scopes": scopes})
            if limits:
                wanted = replace(before.limits, **limits)
                self._limits.set(connection, "tenant", tenant, wanted, at=at)
                note("tenant.limits", asdict(wanted))
            return self._get(connection, tenant)

    def create_key(
        self, tenant: str, *, at: datetime, scopes: frozenset[str] = frozenset({"inference"})
    ) -> tuple[ApiKey, str]:
        """A plain key and its secret; see `Keys.create`."""
        return self.keys.create(tenant, at=at, scopes=scopes)

    def revoke_key(self, key_id: str, *, at: datetime) -> None:
        """See `Keys.revoke`."""
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
