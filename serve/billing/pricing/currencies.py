"""Tells the currency of a tenant's money: its plan's, for good; `DEFAULT_CURRENCY` before it has a plan."""

import json
from collections import defaultdict

import sqlalchemy as sa

from serve.billing.money import DEFAULT_CURRENCY
from serve.billing.pricing.tables import plans_table, subscriptions_table


def currency_of(connection: sa.Connection, tenant: str) -> str:
    """Return the currency that the tenant is billed in."""
    c = subscriptions_table.c
    query = sa.select(plans_table.c.document).join(subscriptions_table, c.plan_id == plans_table.c.id)
    document = connection.execute(query.where(c.tenant_id == tenant).limit(1)).scalar()
    return DEFAULT_CURRENCY if document is None else _currency(document)


def plan_currencies(connection: sa.Connection) -> dict[str, list[int]]:
    """Return, by currency, the ids of the plans' versions in it."""
    plan_ids: dict[str, list[int]] = defaultdict(list)
    for row in connection.execute(sa.select(plans_table.c.id, plans_table.c.document)):
        plan_ids[_currency(row.document)].append(row.id)
    return plan_ids


def _currency(document: str) -> str:
    return str(json.loads(document)["currency"])
