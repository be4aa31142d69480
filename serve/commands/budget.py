"""`bespoke budget`: what tenants, projects and keys may spend."""

from typing import Annotated, Any

import typer

from serve.billing.budgets.service import NOTIFY_PCTS, BudgetService, BudgetUsage
from serve.billing.money import nanos_of_usd, usd
from serve.billing.webhooks.delivery import secret_of
from serve.commands.common import HomeOption, console, now, open_store, settings_of, table
from serve.commands.key import minute
from serve.commands.tenant import tenants_of
from serve.tenants import server_secret
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)


@app.command("set")
def put(
    tenant: str,
    limit_usd: Annotated[str, typer.Option(help="What may be spent in a period.")],
    period: Annotated[str, typer.Option(help="day, month (both UTC) or total.")] = "month",
    project: Annotated[str | None, typer.Option(help="Of this project, by its id.")] = None,
    key: Annotated[str | None, typer.Option(help="Of this key, by its id.")] = None,
    soft: Annotated[bool, typer.Option("--soft", help="Notify only; refuse nothing.")] = False,
    notify: Annotated[str, typer.Option(help="Percentages of the limit at which to notify.")] = ",".join(
        str(pct) for pct in NOTIFY_PCTS
    ),
    webhook: Annotated[str | None, typer.Option(help="Where to send notices.")] = None,
    home: HomeOption = None,
) -> None:
    """Give a tenant, a project or a key a budget, or set the one that it has for such a period."""
    if project is not None and key is not None:
        raise typer.BadParameter("name a project or a key, not both")
    try:
        pcts = tuple(int(pct) for pct in notify.split(",") if pct)
        terms: dict[str, Any] = {"limit_nanos": nanos_of_usd(limit_usd), "hard": not soft}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    terms |= {"notify_pcts": pcts, "webhook_url": webhook}
    level = "project" if project else "key" if key else "tenant"
    subject, at, actor = project or key or tenant, now(), command_actor()
    budgets = _budgets(home)
    found = next(
        (
            one.budget
            for one in budgets.page(tenant, at=at).items
            if one.budget.retired_at is None
            and (one.budget.scope, one.budget.subject, one.budget.period) == (level, subject, period)
        ),
        None,
    )
    if found is None:
        standing = budgets.create(tenant, level, subject, period, at=at, actor=actor, **terms)
    else:
        standing = budgets.change(tenant, found.id, terms, at=at, actor=actor)
    console.print(f"[bold]{standing.budget.id}[/]: {_sentence(standing)}", highlight=False)


@app.command("list")
def index(tenant: str, home: HomeOption = None) -> None:
    """A tenant's budgets, and what is spent and held in the current periods."""
    rows = table("!budget", "of", "period", ">limit USD", ">spent", ">held", "kind", "retired")
    tenants_of(settings_of(home)).get(tenant)
    for standing in _budgets(home).page(tenant, at=now()).items:
        budget = standing.budget
        rows.add_row(
            budget.id,
            budget.subject,
            standing.span,
            usd(budget.limit_nanos),
            usd(standing.spent_nanos),
            usd(standing.held_nanos),
            "hard" if budget.hard else "soft",
            minute(budget.retired_at),
        )
    console.print(rows)


@app.command()
def show(tenant: str, budget: str, home: HomeOption = None) -> None:
    """One budget."""
    standing = _budgets(home).get(tenant, budget, at=now())
    console.print(f"[bold]{budget}[/]: {_sentence(standing)}", highlight=False)
    pcts = ", ".join(f"{pct} %" for pct in standing.budget.notify_pcts) or "never"
    console.print(f"notifies at: {pcts}", highlight=False)
    console.print(f"webhook: {standing.budget.webhook_url or 'none'}", highlight=False, markup=False)


@app.command()
def retire(tenant: str, budget: str, home: HomeOption = None) -> None:
    """Let a budget bind no longer, for good."""
    _budgets(home).retire(tenant, budget, at=now(), actor=command_actor())
    console.print(f"retired [bold]{budget}[/]")


@app.command()
def secret(tenant: str, home: HomeOption = None) -> None:
    """With what the tenant's webhooks are signed; its receivers need it."""
    settings = settings_of(home)
    tenants_of(settings).get(tenant)
    console.print(secret_of(server_secret(settings.home), tenant), highlight=False, soft_wrap=True)


def _budgets(home: Any) -> BudgetService:
    return BudgetService(open_store(settings_of(home)))


def _sentence(standing: BudgetUsage) -> str:
    budget = standing.budget
    kind = "may spend" if budget.hard else "is expected to spend"
    retired = f"; retired {minute(budget.retired_at)}" if budget.retired_at else ""
    return (
        f"{budget.subject} {kind} {usd(budget.limit_nanos)} USD ({budget.period}); "
        f"in {standing.span}: {usd(standing.spent_nanos)} spent, {usd(standing.held_nanos)} held{retired}"
    )
