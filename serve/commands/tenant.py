"""`bespoke tenant`: tenants, their limits and their credit."""

from typing import Annotated

import typer

from serve.billing.ledger.ledger import Ledger
from serve.billing.money import nanos_of_usd, usd
from serve.commands.common import HomeOption, console, now, open_store, settings_of, table
from serve.commands.limits import (
    ConcurrentOption,
    ContextOption,
    ModelsOption,
    RequestsOption,
    TokensOption,
    UnlimitedOption,
    limits_table,
    limits_to_change,
)
from serve.errors import AlreadyExists, UnknownRecord
from serve.settings import Settings
from serve.tenants import Tenants, server_secret
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)


def tenants_of(settings: Settings) -> Tenants:
    return Tenants(open_store(settings), server_secret(settings.home))


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
        Tenants(store, server_secret(settings.home)).create(name, at=now(), actor=command_actor())
    except AlreadyExists:
        if not if_missing:
            raise
        console.print(f"tenant [bold]{name}[/] is there already")
        return
    Ledger(store).open_account(name, credit, actor=command_actor())
    console.print(f"created tenant [bold]{name}[/] with a credit of {usd(credit)} USD")


@app.command()
def credit(name: str, amount_usd: str, home: HomeOption = None) -> None:
    """Set a tenant's credit, in USD. What it has spent stays."""
    try:
        amount = nanos_of_usd(amount_usd)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    Ledger(open_store(settings_of(home))).open_account(name, amount, actor=command_actor())
    console.print(f"tenant [bold]{name}[/] has a credit of {usd(amount)} USD")


@app.command()
def suspend(name: str, home: HomeOption = None) -> None:
    """Refuse all of a tenant's keys, on every gateway within two seconds."""
    tenants_of(settings_of(home)).suspend(name, True, at=now(), actor=command_actor())
    console.print(f"tenant [bold]{name}[/] is suspended")


@app.command()
def resume(name: str, home: HomeOption = None) -> None:
    """Take a suspended tenant's keys again."""
    tenants_of(settings_of(home)).suspend(name, False, at=now(), actor=command_actor())
    console.print(f"tenant [bold]{name}[/] may use the service")


@app.command()
def scopes(
    name: str,
    scope: Annotated[list[str], typer.Option(help="Again for each that its keys may have.")],
    home: HomeOption = None,
) -> None:
    """Say which scopes a tenant's keys may have; those that have others lose them."""
    try:
        tenants_of(settings_of(home)).change(name, at=now(), scopes=frozenset(scope), actor=command_actor())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(f"keys of [bold]{name}[/] may have: {', '.join(sorted(set(scope)))}")


@app.command()
def limits(
    name: str,
    requests_per_min: RequestsOption = None,
    tokens_per_min: TokensOption = None,
    concurrent_requests: ConcurrentOption = None,
    context_tokens: ContextOption = None,
    model: ModelsOption = None,
    unlimited: UnlimitedOption = None,
    home: HomeOption = None,
) -> None:
    """Change the limits that are named, and show all of them."""
    named = limits_to_change(
        requests_per_min, tokens_per_min, concurrent_requests, context_tokens, model, unlimited
    )
    tenant = tenants_of(settings_of(home)).change(name, at=now(), limits=named, actor=command_actor())
    console.print(limits_table(name, tenant.limits))


@app.command("list")
def index(home: HomeOption = None) -> None:
    """Tenants with their accounts, exact to the nano-USD."""
    settings = settings_of(home)
    store = open_store(settings)
    rows = table("!tenant", ">credit USD", ">spent USD", ">held USD", ">available USD", "suspended")
    ledger = Ledger(store)
    for tenant in Tenants(store, server_secret(settings.home)).page().items:
        suspended = f"{tenant.suspended_at:%Y-%m-%d %H:%M}" if tenant.suspended_at else ""
        try:
            account = ledger.account(tenant.id)
        except UnknownRecord:  # whoever created it was cut short
            rows.add_row(tenant.id, *["no account"] * 4, suspended)
            continue
        rows.add_row(
            tenant.id,
            usd(account.credit_nanos),
            usd(account.spent_nanos),
            usd(account.held_nanos),
            usd(account.available_nanos),
            suspended,
        )
    console.print(rows)
