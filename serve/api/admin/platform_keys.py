"""/admin/v1/platform-keys: the operator's own keys."""

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
    Listing,
    Timestamp,
    Title,
    listing,
    maybe_seconds,
    moment,
    now,
    seconds,
)
from serve.tenants import PlatformKey

router: APIRouter = admin_router("platform keys")


class NewPlatformKey(Body):
    name: Title
    expires_at: Timestamp | None = None


class PlatformKeyWire(Identified):
    object: Literal["platform_key"] = "platform_key"
    name: str
    hint: str = Field(description="The last four characters.")
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class NewPlatformKeyWire(PlatformKeyWire):
    secret: str = Field(description="The key itself. Shown only here: we keep a hash.")


@router.post("/platform-keys", status_code=201)
def create(body: NewPlatformKey, caller: AdminCaller, ctx: Ctx) -> NewPlatformKeyWire:
    key, secret = ctx.tenants.platform_keys.create(
        body.name, at=now(), expires_at=moment(body.expires_at), actor=caller.actor
    )
    return NewPlatformKeyWire(**dict(wire(key)), secret=secret)


@router.get("/platform-keys")
def index(ctx: Ctx, after: After = None, limit: Limit = 20) -> Listing[PlatformKeyWire]:
    return listing(ctx.tenants.platform_keys.page(after=after, limit=limit), wire)


@router.delete("/platform-keys/{key}")
def revoke(key: str, caller: AdminCaller, ctx: Ctx) -> PlatformKeyWire:
    """Revoke it. Every gateway refuses it within two seconds. Its record stays."""
    return wire(ctx.tenants.platform_keys.revoke(key, at=now(), actor=caller.actor))


def wire(key: PlatformKey) -> PlatformKeyWire:
    return PlatformKeyWire(
        id=key.id,
        name=key.name,
        hint=key.hint,
        created_at=seconds(key.created_at),
        expires_at=maybe_seconds(key.expires_at),
        revoked_at=maybe_seconds(key.revoked_at),
        last_used_at=maybe_seconds(key.last_used_at),
    )
