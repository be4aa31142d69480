"""`bespoke credit`: grants of credit, some of which expire."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from serve.billing.credits.grants import Credits
from serve.billing.invoicing.calculation import remaining_credit
from serve.billing.jobs import expire_due
from serve.billing.money import exact, labelled, nanos_of
from serve.billing.pricing.currencies import currency_of
from serve.commands.common import HomeOption, JsonOption, console, now, open_store, print_list, settings_of
from serve.commands.tables import Table
from serve.commands.tenant import tenants_of
from serve.storage.database import Store
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)


class Kind(StrEnum):
    PREPAID = "prepaid"
    PROMOTIONAL = "promotional"
    LINE = "line"


@app.command()
def grant(
    tenant: str,
    amount: Annotated[str, typer.Argument(help="Such as 50 or 12.50, in the tenant's currency.")],
    kind: Annotated[
        Kind, typer.Option(help="Prepaid by the tenant, given as a promotion, or lent as a line.")
    ] = Kind.PREPAID,
    expires: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The first day (UTC) without it.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Kept with the grant.")] = None,
    home: HomeOption = None,
) -> None:
    """Give a tenant credit, on top of what it has."""
    try:
        nanos = nanos_of(amount)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if nanos <= 0:
        raise typer.BadParameter("a grant is more than nothing")
    if reason is not None and (len(reason) > 100 or not reason.isprintable()):
        raise typer.BadParameter("a reason has at most 100 printable characters")
    store = open_store(settings_of(home))
    granted = Credits(store).grant(
        tenant,
        nanos,
        kind=kind.value,
        at=now(),
        expires_at=expires.replace(tzinfo=UTC) if expires else None,
        reason=reason,
        actor=command_actor(),
    )
    console.print(
        f"granted [bold]{tenant}[/] {labelled(nanos, _currency(store, tenant))}, {kind.value}: {granted.id}"
    )


@app.command("list")
def index(tenant: str, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List a tenant's grants, and what is left of each."""
    settings = settings_of(home)
    tenants_of(settings).get(tenant)
    store = open_store(settings)
    with store.read() as connection:
        left, currency = remaining_credit(connection, tenant), currency_of(connection, tenant)
    grants = Credits(store).page(tenant)
    if as_json:
        from serve.api.admin.credits import wire

        return print_list(grants, lambda grant: wire(grant, left.get(grant.id, grant.amount_nanos), currency))
    rows = Table("id", "kind", ">amount", ">left", "currency", "granted", "expires", "reason")
    for item in grants.items:
        left_nanos = 0 if item.expired_nanos is not None else left.get(item.id, item.amount_nanos)
        amounts = (exact(item.amount_nanos, currency), exact(left_nanos, currency), currency)
        expires = f"{item.expires_at:%Y-%m-%d}" if item.expires_at else "never"
        created = f"{item.created_at:%Y-%m-%d}"
        rows.add_row(item.id, item.kind, *amounts, created, expires, item.reason or "")
    console.print(rows)


@app.command()
def expire(home: HomeOption = None) -> None:
    """Take back the rest of grants that are due, as the steward does by itself."""
    store = open_store(settings_of(home))
    for item, nanos in expire_due(store, now()):
        console.print(
            f"{item.id} of {item.tenant}: {labelled(nanos, _currency(store, item.tenant))} taken back"
        )


def _currency(store: Store, tenant: str) -> str:
    with store.read() as connection:
        return currency_of(connection, tenant)
