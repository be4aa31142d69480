"""/admin/v1/tenants/{tenant}/adapters: registered versions, and the version that an alias means."""

from typing import Literal

from fastapi import APIRouter
from pydantic import Field

from serve.api.admin.access import AdminCaller
from serve.api.admin.access import router as admin_router
from serve.api.dependencies import Context, Ctx
from serve.api.pagination import (
    After,
    Identified,
    Limit,
    Listing,
    listing,
    maybe_seconds,
    now,
    seconds,
    slice_page,
)
from serve.registry.versions import AdapterVersion, VersionInfo, VersionState

router: APIRouter = admin_router("adapters")

VERSION = "/tenants/{tenant}/adapters/{name}/versions/{version}"


class AdapterWire(Identified):
    object: Literal["adapter"] = "adapter"
    id: str = Field(description="The model name of this version: tenant/name@version.")
    base: str
    state: VersionState
    reason: str | None = Field(description="Why it was rejected.")
    pinned: bool
    alias: Literal["now", "next"] | None = Field(
        description="Whether tenant/name means this version now, or will once it is probed."
    )
    rank: int | None
    bytes: int | None
    registered_at: int
    probed_at: int | None
    retired_at: int | None


@router.get("/tenants/{tenant}/adapters")
def index(tenant: str, ctx: Ctx, after: After = None, limit: Limit = 20) -> Listing[AdapterWire]:
    """Every version ever registered, by name and age."""
    ctx.tenants.get(tenant)
    versions = ctx.registry.entries(tenant)
    return listing(slice_page(versions, lambda info: info.ref.model, after, limit), wire)


@router.post(VERSION + "/promote")
def promote(tenant: str, name: str, version: str, caller: AdminCaller, ctx: Ctx) -> AdapterWire:
    """Let the alias mean this version from now on, or once it is probed."""
    adapter = ctx.registry.find(tenant, name, version)
    ctx.registry.promote(adapter, at=now(), actor=caller.actor)
    return _now(ctx, adapter)


@router.post(VERSION + "/pin")
def pin(tenant: str, name: str, version: str, caller: AdminCaller, ctx: Ctx) -> AdapterWire:
    """Let every replica keep it loaded."""
    adapter = ctx.registry.find(tenant, name, version)
    ctx.registry.pin(adapter, True, actor=caller.actor)
    return _now(ctx, adapter)


@router.post(VERSION + "/unpin")
def unpin(tenant: str, name: str, version: str, caller: AdminCaller, ctx: Ctx) -> AdapterWire:
    """Let replicas unload it when other adapters need its slot."""
    adapter = ctx.registry.find(tenant, name, version)
    ctx.registry.pin(adapter, False, actor=caller.actor)
    return _now(ctx, adapter)


@router.post(VERSION + "/retire")
def retire(tenant: str, name: str, version: str, caller: AdminCaller, ctx: Ctx) -> AdapterWire:
    """Stop serving it, for good. Refused while its alias points to it."""
    adapter = ctx.registry.find(tenant, name, version)
    ctx.registry.retire(adapter, now(), actor=caller.actor)
    return _now(ctx, adapter)


def _now(ctx: Context, adapter: AdapterVersion) -> AdapterWire:
    return wire(ctx.registry.entry(adapter))


def wire(entry: VersionInfo) -> AdapterWire:
    return AdapterWire(
        id=entry.ref.model,
        base=entry.base,
        state=entry.state,
        reason=entry.reason,
        pinned=entry.pinned,
        alias=entry.alias,
        rank=entry.rank,
        bytes=entry.bytes,
        registered_at=seconds(entry.registered_at),
        probed_at=maybe_seconds(entry.probed_at),
        retired_at=maybe_seconds(entry.retired_at),
    )
