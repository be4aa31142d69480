"""The admin API, `/admin/v1`: for platform keys, and for a tenant's admin key within its own tenant."""

from fastapi import APIRouter

from serve.api.admin import adapters, audit, budgets, keys, platform_keys, prices, projects, tenants

router = APIRouter()
for resource in (tenants, projects, keys, budgets, prices, adapters, audit, platform_keys):
    router.include_router(resource.router)

__all__ = ["router"]
