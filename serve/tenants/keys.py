"""Tenants' API keys: creates, changes, rotates and revokes them, and authenticates by them."""

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.errors import Conflict, InvalidRequest, TenantSuspended, Unauthenticated, UnknownRecord
from serve.rate_limits.limits import Limits, LimitStore, Subject
from serve.storage.database import Store
from serve.storage.pagination import Page, page
from serve.tenants.audit import SYSTEM, record
from serve.tenants.key_hash import KeyHasher
from serve.tenants.platform_keys import is_live, note_used
from serve.tenants.projects import project_row
from serve.tenants.tables import keys_table, projects_table, tenants_table

KEY_PREFIX = "bsk-"
SCOPES = frozenset({"inference", "files", "fine-tuning", "billing-read", "admin"})
OVERLAP_MAX = timedelta(days=30)
NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Principal:
    """Identifies an authenticated caller: its tenant, key, scopes and limits."""

    tenant: str
    key_id: str
    scopes: frozenset[str]
    project: str | None = None
    tenant_limits: Limits = NO_LIMITS
    key_limits: Limits = NO_LIMITS

    @property
    def actor(self) -> str:
        return f"key:{self.key_id}"

    @property
    def subjects(self) -> tuple[Subject, Subject]:
        """The tenant and the key, whose limits both apply to a request."""
        return (
            Subject("tenant", self.tenant, self.tenant_limits),
            Subject("key", self.key_id, self.key_limits),
        )

    def may_use(self, model: str) -> bool:
        return all(subject.limits.allows(model) for subject in self.subjects)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Describes a key without its secret. `hint` is the key's last four characters.

    `successor` is the key that replaced it in a rotation.
    """

    id: str
    tenant: str
    hint: str
    scopes: frozenset[str]
    created_at: datetime
    revoked_at: datetime | None = None
    name: str | None = None
    project: str | None = None
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    successor: str | None = None
    limits: Limits = NO_LIMITS


class Keys:
    """Manages the tenants' keys of one store. Methods block and raise StoreUnavailable.

    A method that takes a tenant finds only that tenant's keys.
    """

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = store
        self._hasher = KeyHasher(KEY_PREFIX, secret)
        self._limits = LimitStore(store)

    def create(
        self,
        tenant: str,
        *,
        at: datetime,
        scopes: frozenset[str] = frozenset({"inference"}),
        name: str | None = None,
        project: str | None = None,
        expires_at: datetime | None = None,
        limits: Mapping[str, Any] | None = None,
        actor: str = SYSTEM,
    ) -> tuple[ApiKey, str]:
        """Create a key. Return it and its secret, which is not stored and cannot be shown again.

        Raises UnknownRecord for an unknown tenant or project, ValueError for an unknown scope, and Conflict
        for an archived project. Raises InvalidRequest for a scope that the tenant may not have, for an
        expired key, and for the scope admin on a project's key: admin keys act for the whole tenant.
        """
        if unknown := scopes - SCOPES:
            raise ValueError(f"unknown scopes: {', '.join(sorted(unknown))}")
        if expires_at is not None and expires_at <= at:
            raise InvalidRequest("'expires_at' must be in the future.", "expires_at", "invalid_value")
        if project is not None and "admin" in scopes:
            raise InvalidRequest("A project's key cannot have the scope 'admin'.", "scopes", "invalid_value")
        with self._store.write() as connection:
            _require_allowed(connection, tenant, scopes)
            if project is not None and project_row(connection, tenant, project).archived_at is not None:
                raise Conflict(f"The project '{project}' is archived.")
            key = ApiKey(
                f"key_{secrets.token_hex(8)}", tenant, "", scopes, at, None, name, project, expires_at
            )
            key, secret = self._insert(connection, replace(key, limits=Limits(**(limits or {}))))
            record(connection, "key.create", key.id, _audit_details(key), actor=actor, tenant=tenant, at=at)
        return key, secret

    def change(
        self,
        tenant: str,
        key_id: str,
        *,
        at: datetime,
        name: str | None = None,
        limits: Mapping[str, Any] | None = None,
        actor: str = SYSTEM,
    ) -> ApiKey:
        """Rename a key, or change the limits that are named. A limit of None is removed.

        Raises UnknownRecord.
        """
        with self._store.write() as connection:
            key = self._get(connection, key_id, tenant, for_update=True)
            if name is not None:
                self._update(connection, key_id, name=name)
                record(connection, "key.rename", key_id, {"name": name}, actor=actor, tenant=tenant, at=at)
            if limits:
                changed_limits = replace(key.limits, **limits)
                self._limits.set(connection, "key", key_id, changed_limits, at=at)
                audit_details = asdict(changed_limits)
                record(connection, "key.limits", key_id, audit_details, actor=actor, tenant=tenant, at=at)
            return self._get(connection, key_id, tenant)

    def rotate(
        self,
        key_id: str,
        *,
        overlap: timedelta,
        at: datetime,
        tenant: str | None = None,
        actor: str = SYSTEM,
    ) -> tuple[ApiKey, str]:
        """Replace `key_id`, which works for `overlap` more. Return the new key and its secret.

        The new key has the old one's name, scopes, project, limits and original lifetime. Raises
        UnknownRecord, and InvalidRequest for an overlap out of bounds. Raises Conflict if the key works no
        longer or has a successor: a key is rotated once.
        """
        if not timedelta(0) <= overlap <= OVERLAP_MAX:
            most = int(OVERLAP_MAX.total_seconds())
            raise InvalidRequest(f"The overlap must be 0 to {most} seconds.", "overlap_s", "invalid_value")
        with self._store.write() as connection:
            old = self._get(connection, key_id, tenant, for_update=True)
            if old.revoked_at is not None or not is_live(old.expires_at, at):
                raise Conflict(f"The key '{key_id}' works no longer.")
            if old.successor is not None:
                raise Conflict(f"The key '{key_id}' was rotated already, to '{old.successor}'.")
            new_id, overlap_ends_at = f"key_{secrets.token_hex(8)}", at + overlap
            expires_at = None if old.expires_at is None else at + (old.expires_at - old.created_at)
            new = replace(old, id=new_id, created_at=at, expires_at=expires_at, last_used_at=None)
            new, secret = self._insert(connection, new)
            old_expires_at = (
                overlap_ends_at if old.expires_at is None else min(overlap_ends_at, old.expires_at)
            )
            self._update(connection, key_id, expires_at=old_expires_at, successor_id=new_id)
            audit_details = {"successor": new_id, "old_expires_at": old_expires_at}
            record(connection, "key.rotate", key_id, audit_details, actor=actor, tenant=old.tenant, at=at)
        return new, secret

    def revoke(self, key_id: str, *, at: datetime, tenant: str | None = None, actor: str = SYSTEM) -> ApiKey:
        """Revoke a key. Revoking twice keeps the first time. Raises UnknownRecord."""
        with self._store.write() as connection:
            key = self._get(connection, key_id, tenant, for_update=True)
            if key.revoked_at is None:
                self._update(connection, key_id, revoked_at=at)
                record(connection, "key.revoke", key_id, actor=actor, tenant=key.tenant, at=at)
            return self._get(connection, key_id, tenant)

    def get(self, key_id: str, tenant: str | None = None) -> ApiKey:
        """Raises UnknownRecord."""
        with self._store.read() as connection:
            return self._get(connection, key_id, tenant)

    def page(self, tenant: str, *, after: str | None = None, limit: int | None = None) -> Page[ApiKey]:
        """Return the tenant's keys, oldest first. Raises InvalidRequest if `after` is none of them."""
        with self._store.read() as connection:
            whose = keys_table.c.tenant_id == tenant
            rows = page(connection, keys_table, whose, after=after, limit=limit)
            return Page([self._key(connection, row) for row in rows.items], rows.has_more)

    def digest(self, key: str) -> str:
        return self._hasher.digest(key)

    def find(self, digest: str, at: datetime) -> Principal:
        """Return the principal of a key. Raises Unauthenticated unless it is live, or TenantSuspended."""
        k, t, p = keys_table.c, tenants_table.c, projects_table.c
        query = (
            sa.select(keys_table, t.suspended_at, t.scopes.label("tenant_scopes"), p.archived_at)
            .join(tenants_table, t.id == k.tenant_id)
            .outerjoin(projects_table, p.id == k.project_id)
            .where(k.digest == digest)
        )
        with self._store.read() as connection:
            row = connection.execute(query).first()
            if row is None or row.revoked_at or row.archived_at or not is_live(row.expires_at, at):
                raise Unauthenticated()
            if row.suspended_at is not None:
                raise TenantSuspended()
            return Principal(
                row.tenant_id,
                row.id,
                read_scopes(row.scopes) & read_scopes(row.tenant_scopes),
                row.project_id,
                self._limits.of(connection, "tenant", row.tenant_id),
                self._limits.of(connection, "key", row.id),
            )

    def note_used(self, used: Mapping[str, datetime]) -> None:
        with self._store.write() as connection:
            note_used(connection, keys_table, used)

    def _insert(self, connection: sa.Connection, key: ApiKey) -> tuple[ApiKey, str]:
        secret, columns = self._hasher.new()
        row = {
            "id": key.id,
            "tenant_id": key.tenant,
            "scopes": " ".join(sorted(key.scopes)),
            "created_at": key.created_at,
            "name": key.name,
            "project_id": key.project,
            "expires_at": key.expires_at,
        }
        connection.execute(keys_table.insert().values(row | columns))
        if key.limits != NO_LIMITS:
            self._limits.set(connection, "key", key.id, key.limits, at=key.created_at)
        return replace(key, hint=columns["hint"]), secret

    def _update(self, connection: sa.Connection, key_id: str, **values: Any) -> None:
        connection.execute(keys_table.update().where(keys_table.c.id == key_id).values(values))

    def _get(
        self, connection: sa.Connection, key_id: str, tenant: str | None, *, for_update: bool = False
    ) -> ApiKey:
        query = sa.select(keys_table).where(keys_table.c.id == key_id)
        if tenant is not None:
            query = query.where(keys_table.c.tenant_id == tenant)
        row = connection.execute(query.with_for_update() if for_update else query).first()
        if row is None:
            raise UnknownRecord(f"There is no key '{key_id}'.")
        return self._key(connection, row)

    def _key(self, connection: sa.Connection, row: sa.Row[Any]) -> ApiKey:
        return ApiKey(
            id=row.id,
            tenant=row.tenant_id,
            hint=row.hint,
            scopes=read_scopes(row.scopes),
            created_at=row.created_at,
            revoked_at=row.revoked_at,
            name=row.name,
            project=row.project_id,
            expires_at=row.expires_at,
            last_used_at=row.last_used_at,
            successor=row.successor_id,
            limits=self._limits.of(connection, "key", row.id),
        )


def read_scopes(column: str | None) -> frozenset[str]:
    """Return the scopes in a column. NULL means all, for a tenant that was never restricted."""
    return SCOPES if column is None else frozenset(column.split())


def _require_allowed(connection: sa.Connection, tenant: str, scopes: frozenset[str]) -> None:
    row = connection.execute(sa.select(tenants_table).where(tenants_table.c.id == tenant)).first()
    if row is None:
        raise UnknownRecord(f"There is no tenant '{tenant}'.")
    if denied := scopes - read_scopes(row.scopes):
        names = ", ".join(sorted(denied))
        raise InvalidRequest(f"Keys of '{tenant}' may not have: {names}.", "scopes", "scope_not_allowed")


def _audit_details(key: ApiKey) -> dict[str, Any]:
    """Return the audit log's details of a new key: neither its secret nor a digest of it."""
    return {
        "name": key.name,
        "scopes": key.scopes,
        "project": key.project,
        "expires_at": key.expires_at,
        "limits": asdict(key.limits),
    }
