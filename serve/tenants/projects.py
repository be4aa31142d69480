"""Projects group a tenant's keys. A key needs no project; archiving a project ends its keys."""

import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from finetune.card import validate_name
from serve.errors import AlreadyExists, UnknownRecord
from serve.storage.database import Store
from serve.storage.pagination import Page, page
from serve.tenants.audit import SYSTEM, record
from serve.tenants.tables import projects_table, tenants_table


@dataclass(frozen=True, slots=True)
class Project:
    id: str
    tenant: str
    name: str
    created_at: datetime
    archived_at: datetime | None = None


class Projects:
    """Manages the projects of one store. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, tenant: str, name: str, *, at: datetime, actor: str = SYSTEM) -> Project:
        """Create a project. Raises InvalidName, UnknownRecord for an unknown tenant, or AlreadyExists."""
        project = Project(f"proj_{secrets.token_hex(8)}", tenant, validate_name(name), at)
        row = {"id": project.id, "tenant_id": tenant, "name": name, "created_at": at}
        try:
            with self._store.write() as connection:
                if connection.execute(sa.select(1).where(tenants_table.c.id == tenant)).first() is None:
                    raise UnknownRecord(f"There is no tenant '{tenant}'.")
                connection.execute(projects_table.insert().values(row))
                record(
                    connection,
                    "project.create",
                    project.id,
                    {"name": name},
                    actor=actor,
                    tenant=tenant,
                    at=at,
                )
        except sa.exc.IntegrityError as error:
            raise AlreadyExists(f"The tenant '{tenant}' has a project '{name}' already.") from error
        return project

    def archive(self, tenant: str, project: str, *, at: datetime, actor: str = SYSTEM) -> Project:
        """End the project's keys permanently. Archiving twice keeps the first time.

        Raises UnknownRecord if the tenant has no such project.
        """
        with self._store.write() as connection:
            row = project_row(connection, tenant, project, for_update=True)
            if row.archived_at is None:
                c = projects_table.c
                connection.execute(projects_table.update().where(c.id == project).values(archived_at=at))
                record(connection, "project.archive", project, actor=actor, tenant=tenant, at=at)
            return _project(project_row(connection, tenant, project))

    def page(self, tenant: str, *, after: str | None = None, limit: int | None = None) -> Page[Project]:
        """Return the tenant's projects, oldest first. Raises InvalidRequest if `after` is none of them."""
        with self._store.read() as connection:
            owned = projects_table.c.tenant_id == tenant
            rows = page(connection, projects_table, owned, after=after, limit=limit)
        return Page([_project(row) for row in rows.items], rows.has_more)


def project_row(
    connection: sa.Connection, tenant: str, project: str, *, for_update: bool = False
) -> sa.Row[Any]:
    """Return the project's row. Raises UnknownRecord, also for another tenant's project."""
    c = projects_table.c
    query = sa.select(projects_table).where(c.id == project, c.tenant_id == tenant)
    row = connection.execute(query.with_for_update() if for_update else query).first()
    if row is None:
        raise UnknownRecord(f"The tenant '{tenant}' has no project '{project}'.")
    return row


def _project(row: sa.Row[Any]) -> Project:
    return Project(row.id, row.tenant_id, row.name, row.created_at, row.archived_at)
