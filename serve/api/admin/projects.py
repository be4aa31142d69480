"""/admin/v1/tenants/{tenant}/projects: create, list and archive projects."""

from typing import Literal

from fastapi import APIRouter

from serve.api.admin.access import AdminCaller
from serve.api.admin.access import router as admin_router
from serve.api.dependencies import Ctx
from serve.api.pagination import (
    After,
    Body,
    Identified,
    Limit,
    Listing,
    PlainName,
    listing,
    maybe_seconds,
    now,
    seconds,
)
from serve.tenants import Project

router: APIRouter = admin_router("projects", own_tenant=True)


class NewProject(Body):
    name: PlainName


class ProjectWire(Identified):
    object: Literal["project"] = "project"
    tenant: str
    name: str
    created_at: int
    archived_at: int | None


@router.post("/tenants/{tenant}/projects", status_code=201)
def create(tenant: str, body: NewProject, caller: AdminCaller, ctx: Ctx) -> ProjectWire:
    return wire(ctx.tenants.projects.create(tenant, body.name, at=now(), actor=caller.actor))


@router.get("/tenants/{tenant}/projects")
def index(tenant: str, ctx: Ctx, after: After = None, limit: Limit = 20) -> Listing[ProjectWire]:
    ctx.tenants.get(tenant)
    return listing(ctx.tenants.projects.page(tenant, after=after, limit=limit), wire)


@router.post("/tenants/{tenant}/projects/{project}/archive")
def archive(tenant: str, project: str, caller: AdminCaller, ctx: Ctx) -> ProjectWire:
    """Archive it for good. Its keys stop working."""
    return wire(ctx.tenants.projects.archive(tenant, project, at=now(), actor=caller.actor))


def wire(project: Project) -> ProjectWire:
    return ProjectWire(
        id=project.id,
        tenant=project.tenant,
        name=project.name,
        created_at=seconds(project.created_at),
        archived_at=maybe_seconds(project.archived_at),
    )
