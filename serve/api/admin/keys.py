"""/admin/v1/tenants/{tenant}/keys: create, change, rotate and revoke API keys."""

from datetime import timedelta
from typing import Literal

from fastapi import APIRouter
from pydantic import Field

from serve.api.admin.access import AdminCaller
from serve.api.admin.access import router as admin_router
from serve.api.dependencies import Ctx
from serve.api.pagination import (
    After,
    Body,
    Identified,
    Limit,
    LimitsBody,
    LimitsWire,
    Listing,
    Scope,
    Timestamp,
    Title,
    listing,
    maybe_seconds,
    moment,
    now,
    seconds,
)
from serve.tenants import ApiKey
from serve.tenants.keys import OVERLAP_MAX

router: APIRouter = admin_router("keys", own_tenant=True)


class NewKey(Body):
    name: Title | None = None
    scopes: list[Scope] = Field(["inference"], min_length=1, max_length=5)
    project: str | None = Field(None, max_length=32, pattern="^[a-z0-9_]+$")
    expires_at: Timestamp | None = None
    limits: LimitsBody | None = None


class KeyChange(Body):
    name: Title | None = None
    limits: LimitsBody | None = None


class Rotation(Body):
    overlap_s: int = Field(
        86_400,
        ge=0,
        le=int(OVERLAP_MAX.total_seconds()),
        description="How long the old key works beside the new one.",
    )


class KeyWire(Identified):
    object: Literal["api_key"] = "api_key"
    tenant: str
    name: str | None
    hint: str = Field(description="The last four characters.")
    scopes: list[Scope]
    project: str | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None
    successor: str | None = Field(description="The key that a rotation made to follow it.")
    limits: LimitsWire


class NewKeyWire(KeyWire):
    secret: str = Field(description="The key itself. Shown only here: we keep a hash.")


@router.post("/tenants/{tenant}/keys", status_code=201)
def create(tenant: str, body: NewKey, caller: AdminCaller, ctx: Ctx) -> NewKeyWire:
    key, secret = ctx.tenants.keys.create(
        tenant,
        at=now(),
        scopes=frozenset(body.scopes),
        name=body.name,
        project=body.project,
        expires_at=moment(body.expires_at),
        limits=body.limits.named() if body.limits else None,
        actor=caller.actor,
    )
    return _with_secret(key, secret)


@router.get("/tenants/{tenant}/keys")
def index(tenant: str, ctx: Ctx, after: After = None, limit: Limit = 20) -> Listing[KeyWire]:
    ctx.tenants.get(tenant)
    return listing(ctx.tenants.keys.page(tenant, after=after, limit=limit), wire)


@router.patch("/tenants/{tenant}/keys/{key}")
def change(tenant: str, key: str, body: KeyChange, caller: AdminCaller, ctx: Ctx) -> KeyWire:
    """Rename a key, or change the limits that are named."""
    limits = body.limits.named() if body.limits else None
    changed = ctx.tenants.keys.change(
        tenant, key, at=now(), name=body.name, limits=limits, actor=caller.actor
    )
    return wire(changed)


@router.post("/tenants/{tenant}/keys/{key}/rotate", status_code=201)
def rotate(tenant: str, key: str, body: Rotation, caller: AdminCaller, ctx: Ctx) -> NewKeyWire:
    """Create a key with the old key's rights. The old key expires after the overlap."""
    new, secret = ctx.tenants.keys.rotate(
        key, overlap=timedelta(seconds=body.overlap_s), at=now(), tenant=tenant, actor=caller.actor
    )
    return _with_secret(new, secret)


@router.delete("/tenants/{tenant}/keys/{key}")
def revoke(tenant: str, key: str, caller: AdminCaller, ctx: Ctx) -> KeyWire:
    """Revoke it. Every gateway refuses it within two seconds. Its record stays."""
    return wire(ctx.tenants.keys.revoke(key, at=now(), tenant=tenant, actor=caller.actor))


def wire(key: ApiKey) -> KeyWire:
    return KeyWire(
        id=key.id,
        tenant=key.tenant,
        name=key.name,
        hint=key.hint,
        scopes=sorted(key.scopes),
        project=key.project,
        created_at=seconds(key.created_at),
        expires_at=maybe_seconds(key.expires_at),
        revoked_at=maybe_seconds(key.revoked_at),
        last_used_at=maybe_seconds(key.last_used_at),
        successor=key.successor,
        limits=LimitsWire.of(key.limits),
    )


def _with_secret(key: ApiKey, secret: str) -> NewKeyWire:
    return NewKeyWire(**dict(wire(key)), secret=secret)
