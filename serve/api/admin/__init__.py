"""Serves the admin API, `/admin/v1`: for platform keys, and for a tenant's admin key in its own tenant."""

from fastapi import APIRouter

from serve.api.admin import (
    adapters,
    audit,
    budgets,
    credits,
    invoices,
    keys,
    platform_keys,
    prices,
    projects,
    tenants,
)

router = APIRouter()
_RESOURCES = (
    tenants,
    projects,
    keys,
    budgets,
    prices,
    credits,
    invoices,
    adapters,
    audit,
    platform_keys,
)
for resource in _RESOURCES:
    router.include_router(resource.router)

__all__ = ["router"]
