"""/admin/v1/audit: the audit log, newest first."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from serve.api.admin.access import router as admin_router
from serve.api.dependencies import Ctx
from serve.api.pagination import Identified, Limit, Listing, PlainName, listing, seconds
from serve.storage.pagination import Page
from serve.tenants.audit import Audit, AuditEntry

router: APIRouter = admin_router("audit")

Cursor = Annotated[
    str | None,
    Query(pattern="^audit_[0-9]{1,18}$", description="The id of the last item of the page before."),
]
Action = Annotated[str | None, Query(pattern=r"^[a-z_]{1,20}\.[a-z_]{1,11}$", examples=["key.create"])]


class AuditWire(Identified):
    object: Literal["audit"] = "audit"
    at: int
    actor: str = Field(description="platform:<key id>, key:<key id>, command:<user> or system.")
    action: str
    tenant: str | None
    subject: str
    details: dict[str, Any]


@router.get("/audit")
def index(
    ctx: Ctx,
    after: Cursor = None,
    limit: Limit = 20,
    tenant: PlainName | None = None,
    action: Action = None,
) -> Listing[AuditWire]:
    before = None if after is None else int(after.removeprefix("audit_"))
    entries = Audit(ctx.store).entries(tenant=tenant, action=action, before=before, limit=limit + 1)
    return listing(Page(entries[:limit], len(entries) > limit), wire)


def wire(entry: AuditEntry) -> AuditWire:
    return AuditWire(
        id=f"audit_{entry.id}",
        at=seconds(entry.at),
        actor=entry.actor,
        action=entry.action,
        tenant=entry.tenant,
        subject=entry.subject,
        details=dict(entry.details),
    )
