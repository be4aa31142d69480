"""Serves `/v1/organization`: usage and costs in OpenAI's format, the month's forecast, balance, invoices.

For platform keys, which see all tenants, and for a tenant's keys with the scope `billing-read`.
"""

from fastapi import APIRouter

from serve.api.organization import costs, forecast, invoices, usage

router = APIRouter()
for resource in (usage, costs, forecast, invoices):
    router.include_router(resource.router)

__all__ = ["router"]
