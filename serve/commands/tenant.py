"""`bespoke tenant`: tenants and their credit."""

from typing import Annotated

import typer

from serve.billing.ledger import Ledger
from serve.billing.money import nanos_of_usd, usd
from serve.commands.parts import HomeOption, console, now, open_store, settings_of, table
from serve.errors import AlreadyExists
from serve.tenants import Tenants, server_secret

app = typer.Typer(no_args_is_help=True)


@app.command()
def create(
    name: str,
    credit_usd: Annotated[str, typer.Option(help="What the tenant may spend, in USD.")] = "100",
    if_missing: Annotated[bool, typer.Option(help="Do nothing if the tenant exists.")] = False,
    home: HomeOption = None,
) -> None:
    """Create a tenant and its account."""
    settings = settings_of(home)
    try:
        credit = nanos_of_usd(credit_usd)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    store = open_store(settings)
    try:
        Tenants(store, server_secret(settings.home)).create(name, at=now())
    except AlreadyExists:
        if not if_missing:
            raise
        console.print(f"tenant [bold]{name}[/] is there already")
        return
    Ledger(store).open_account(name, credit)
    console.print(f"created tenant [bold]{name}[/] with a credit of {usd(credit)} USD")


@app.command()
def credit(name: str, amount_usd: str, home: HomeOption = None) -> None:
    """Set a tenant's credit, in USD. What it has spent stays."""
    try:
        amount = nanos_of_usd(amount_usd)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    Ledger(open_store(settings_of(home))).open_account(name, amount)
    console.print(f"tenant [bold]{name}[/] has a credit of {usd(amount)} USD")


@app.command("list")
def index(home: HomeOption = None) -> None:
    """Tenants with their accounts, exact to the nano-USD."""
    settings = settings_of(home)
    store = open_store(settings)
    rows = table("tenant", ">credit USD", ">spent USD", ">held USD", ">available USD")
    ledger = Ledger(store)
    for name in Tenants(store, server_secret(settings.home)).names():
        account = ledger.account(name)
        rows.add_row(
            name,
            usd(account.credit_nanos),
            usd(account.spent_nanos),
            usd(account.held_nanos),
            usd(account.available_nanos),
        )
    console.print(rows)
