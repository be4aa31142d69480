"""`/v1/organization`: usage and costs in OpenAI's shape, the month's forecast, the balance, invoices.

For platform keys, which see all tenants, and for a tenant's keys with the scope `billing-read`.
"""

from fastapi import APIRouter

from serve.api.organization import costs, invoices, standing, usage

router = APIRouter()
for resource in (usage, costs, standing, invoices):
    router.include_router(resource.router)

__all__ = ["router"]
