"""`bespoke tenant`: tenants, their limits and their credit."""

from typing import Annotated

import typer

from serve.billing.ledger.accounts import Account
from serve.billing.ledger.ledger import Ledger
from serve.billing.money import exact, labelled, nanos_of
from serve.commands.common import (
    HomeOption,
    JsonOption,
    console,
    minute,
    now,
    open_store,
    print_json,
    print_list,
    settings_of,
)
from serve.commands.limits import (
    ConcurrentOption,
    ContextOption,
    ModelsOption,
    RequestsOption,
    TokensOption,
    UnlimitedOption,
    limits_record,
    limits_to_change,
)
from serve.commands.tables import Table
from serve.errors import AlreadyExists, UnknownRecord
from serve.settings import Settings
from serve.storage.database import Store
from serve.tenants import Tenants, server_secret
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)


def tenants_of(settings: Settings) -> Tenants:
    return Tenants(open_store(settings), server_secret(settings.home))


@app.command()
def create(
    name: str,
    credit: Annotated[
        str,
        typer.Option("--credit", help="How much the tenant may spend, in its plan's currency."),
    ] = "100",
    if_missing: Annotated[bool, typer.Option(help="Do nothing if the tenant exists.")] = False,
    home: HomeOption = None,
) -> None:
    """Create a tenant and its account."""
    settings = settings_of(home)
    try:
        credit_nanos = nanos_of(credit)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    store = open_store(settings)
    try:
        Tenants(store, server_secret(settings.home)).create(name, at=now(), actor=command_actor())
    except AlreadyExists:
        if not if_missing:
            raise
        console.print(f"tenant [bold]{name}[/] exists already")
        return
    Ledger(store).open_account(name, credit_nanos, actor=command_actor())
    console.print(f"created tenant [bold]{name}[/] with a credit of {_amount(store, name, credit_nanos)}")


@app.command()
def credit(name: str, amount: str, home: HomeOption = None) -> None:
    """Set a tenant's credit, in its currency. Its spending so far still counts."""
    try:
        nanos = nanos_of(amount)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    store = open_store(settings_of(home))
    Ledger(store).open_account(name, nanos, actor=command_actor())
    console.print(f"tenant [bold]{name}[/] has a credit of {_amount(store, name, nanos)}")


@app.command()
def suspend(name: str, home: HomeOption = None) -> None:
    """Suspend a tenant: every gateway refuses its keys within two seconds."""
    tenants_of(settings_of(home)).suspend(name, True, at=now(), actor=command_actor())
    console.print(f"tenant [bold]{name}[/] is suspended")


@app.command()
def resume(name: str, home: HomeOption = None) -> None:
    """Resume a suspended tenant: its keys work again."""
    tenants_of(settings_of(home)).suspend(name, False, at=now(), actor=command_actor())
    console.print(f"tenant [bold]{name}[/] may use the service")


@app.command()
def scopes(
    name: str,
    scope: Annotated[list[str], typer.Option(help="A scope that its keys may have; may be repeated.")],
    home: HomeOption = None,
) -> None:
    """Set the scopes that a tenant's keys may have. Keys with other scopes lose those."""
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
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Change the limits that are named, and show all of them."""
    named = limits_to_change(
        requests_per_min, tokens_per_min, concurrent_requests, context_tokens, model, unlimited
    )
    tenant = tenants_of(settings_of(home)).change(name, at=now(), limits=named, actor=command_actor())
    if as_json:
        from serve.api.admin.tenants import wire

        return print_json(wire(tenant))
    console.print(limits_record("tenant", name, tenant.limits))


@app.command("list")
def index(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List tenants with their accounts, exact to the nano."""
    settings = settings_of(home)
    store = open_store(settings)
    ledger = Ledger(store)
    page = Tenants(store, server_secret(settings.home)).page()
    accounts = {tenant.id: _account(ledger, tenant.id) for tenant in page.items}
    if as_json:
        from serve.commands.wire import tenant_and_account

        return print_list(page, lambda tenant: tenant_and_account(tenant, accounts[tenant.id]))
    rows = Table("tenant", ">credit", ">spent", ">held", ">available", "currency", "suspended")
    for tenant in page.items:
        account, suspended = accounts[tenant.id], minute(tenant.suspended_at)
        if account is None:
            rows.add_row(tenant.id, *["no account"] * 4, "", suspended)
            continue
        rows.add_row(
            tenant.id,
            exact(account.credit_nanos, account.currency),
            exact(account.spent_nanos, account.currency),
            exact(account.held_nanos, account.currency),
            exact(account.available_nanos, account.currency),
            account.currency,
            suspended,
        )
    console.print(rows)


def _amount(store: Store, tenant: str, nanos: int) -> str:
    return labelled(nanos, Ledger(store).account(tenant).currency)


def _account(ledger: Ledger, tenant: str) -> Account | None:
    """None where the creation of the tenant was cut short before its account was opened."""
    try:
        return ledger.account(tenant)
    except UnknownRecord:
        return None
