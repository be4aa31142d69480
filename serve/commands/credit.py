"""`bespoke credit`: grants of credit, some of which expire."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from serve.billing.credits.grants import Credits
from serve.billing.invoicing.calculation import remaining_credit
from serve.billing.jobs import expire_due
from serve.billing.money import nanos_of_usd, usd
from serve.commands.common import HomeOption, console, now, open_store, settings_of, table
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
    kind: Annotated[Kind, typer.Option(help="Paid before; given; or lent.")] = Kind.PREPAID,
    expires: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The first day (UTC) without it.")
    ] = None,
    reason: Annotated[str | None, typer.Option()] = None,
    home: HomeOption = None,
) -> None:
    """Give a tenant credit, on top of what it has."""
    try:
        nanos = nanos_of_usd(amount)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if nanos <= 0:
        raise typer.BadParameter("a grant is more than nothing")
    if reason is not None and (len(reason) > 100 or not reason.isprintable()):
        raise typer.BadParameter("a reason has at most 100 printable characters")
    made = Credits(open_store(settings_of(home))).grant(
        tenant,
        nanos,
        kind=kind.value,
        at=now(),
        expires_at=expires.replace(tzinfo=UTC) if expires else None,
        reason=reason,
        actor=command_actor(),
    )
    console.print(f"granted [bold]{tenant}[/] {usd(nanos)}, {kind.value}: {made.id}", highlight=False)


@app.command("list")
def index(tenant: str, home: HomeOption = None) -> None:
    """A tenant's grants, and what is left of each."""
    store = open_store(settings_of(home))
    rows = table("!id", "kind", ">amount", ">left", "granted", "expires", "reason")
    with store.read() as connection:
        left = remaining_credit(connection, tenant)
    for one in Credits(store).page(tenant).items:
        rest = usd(0) if one.expired_nanos is not None else usd(left.get(one.id, one.amount_nanos))
        expires = f"{one.expires_at:%Y-%m-%d}" if one.expires_at else "never"
        given = f"{one.created_at:%Y-%m-%d}"
        rows.add_row(one.id, one.kind, usd(one.amount_nanos), rest, given, expires, one.reason or "")
    console.print(rows)


@app.command()
def expire(home: HomeOption = None) -> None:
    """Take back what is left of grants that are due, as the steward does by itself."""
    for one, taken in expire_due(open_store(settings_of(home)), now()):
        console.print(f"{one.id} of {one.tenant}: {usd(taken)} taken back", highlight=False)
