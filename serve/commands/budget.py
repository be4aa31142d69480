"""`bespoke budget`: spending limits of tenants, projects and keys."""

from pathlib import Path
from typing import Annotated, Any

import typer

from serve.billing.budgets.service import NOTIFY_PCTS, BudgetService, BudgetUsage
from serve.billing.money import exact, labelled, nanos_of
from serve.billing.webhooks.delivery import secret_of
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
from serve.commands.tables import Table
from serve.commands.tenant import tenants_of
from serve.tenants import server_secret
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)


@app.command("set")
def put(
    tenant: str,
    limit: Annotated[
        str, typer.Option(help="The most that may be spent in a period, in the tenant's currency.")
    ],
    period: Annotated[str, typer.Option(help="day, month (both in UTC) or total.")] = "month",
    project: Annotated[str | None, typer.Option(help="The budget of this project, by its id.")] = None,
    key: Annotated[str | None, typer.Option(help="The budget of this key, by its id.")] = None,
    soft: Annotated[bool, typer.Option("--soft", help="Notify only; refuse nothing.")] = False,
    notify: Annotated[str, typer.Option(help="Percentages of the limit at which to notify.")] = ",".join(
        str(pct) for pct in NOTIFY_PCTS
    ),
    webhook: Annotated[str | None, typer.Option(help="The URL that notices are sent to.")] = None,
    home: HomeOption = None,
) -> None:
    """Give a tenant, a project or a key a budget, or change the one that it has for this period."""
    if project is not None and key is not None:
        raise typer.BadParameter("name a project or a key, not both")
    try:
        pcts = tuple(int(pct) for pct in notify.split(",") if pct)
        terms: dict[str, Any] = {"limit_nanos": nanos_of(limit), "hard": not soft}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    terms |= {"notify_pcts": pcts, "webhook_url": webhook}
    level = "project" if project else "key" if key else "tenant"
    subject, at, actor = project or key or tenant, now(), command_actor()
    budgets = _budgets(home)
    current = next(
        (
            usage.budget
            for usage in budgets.page(tenant, at=at).items
            if usage.budget.retired_at is None
            and (usage.budget.scope, usage.budget.subject, usage.budget.period) == (level, subject, period)
        ),
        None,
    )
    if current is None:
        usage = budgets.create(tenant, level, subject, period, at=at, actor=actor, **terms)
    else:
        usage = budgets.change(tenant, current.id, terms, at=at, actor=actor)
    console.print(f"[bold]{usage.budget.id}[/]: {_sentence(usage)}")


@app.command("list")
def index(tenant: str, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List a tenant's budgets, and what is spent and held in their current periods."""
    tenants_of(settings_of(home)).get(tenant)
    page = _budgets(home).page(tenant, at=now())
    if as_json:
        from serve.api.admin.budgets import wire

        return print_list(page, wire)
    rows = Table("budget", "of", "period", ">limit", ">spent", ">held", "currency", "kind", "retired")
    for usage in page.items:
        budget = usage.budget
        rows.add_row(
            budget.id,
            budget.subject,
            usage.span,
            exact(budget.limit_nanos, usage.currency),
            exact(usage.spent_nanos, usage.currency),
            exact(usage.held_nanos, usage.currency),
            usage.currency,
            "hard" if budget.hard else "soft",
            minute(budget.retired_at),
        )
    console.print(rows)


@app.command()
def show(tenant: str, budget: str, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Show one budget."""
    usage = _budgets(home).get(tenant, budget, at=now())
    if as_json:
        from serve.api.admin.budgets import wire

        return print_json(wire(usage))
    console.print(f"[bold]{budget}[/]: {_sentence(usage)}")
    pcts = ", ".join(f"{pct} %" for pct in usage.budget.notify_pcts) or "never"
    console.print(f"notifies at: {pcts}")
    console.print(f"webhook: {usage.budget.webhook_url or 'none'}", markup=False)


@app.command()
def retire(tenant: str, budget: str, home: HomeOption = None) -> None:
    """End a budget, for good."""
    _budgets(home).retire(tenant, budget, at=now(), actor=command_actor())
    console.print(f"retired [bold]{budget}[/]")


@app.command()
def secret(tenant: str, home: HomeOption = None) -> None:
    """Print the secret that signs the tenant's webhooks; their receivers need it."""
    settings = settings_of(home)
    tenants_of(settings).get(tenant)
    console.print(secret_of(server_secret(settings.home), tenant))


def _budgets(home: Path | None) -> BudgetService:
    return BudgetService(open_store(settings_of(home)))


def _sentence(usage: BudgetUsage) -> str:
    budget = usage.budget
    kind = "may spend" if budget.hard else "is expected to spend"
    retired = f"; retired {minute(budget.retired_at)}" if budget.retired_at else ""
    limit, spent, held = (
        labelled(nanos, usage.currency) for nanos in (budget.limit_nanos, usage.spent_nanos, usage.held_nanos)
    )
    return (
        f"{budget.subject} {kind} {limit} ({budget.period}); "
        f"in {usage.span}: {spent} spent, {held} held{retired}"
    )
