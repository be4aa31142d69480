"""`bespoke price`: price plans."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import yaml

from serve.billing.money import exact
from serve.billing.pricing.plans import PricePlan, Prices, Rates, TieredRates, read_plan
from serve.billing.pricing.tiers import Graduated, Package, Volume
from serve.commands.common import HomeOption, JsonOption, console, now, open_store, print_list, settings_of
from serve.commands.tables import Table
from serve.errors import OperatorError
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)


FromOption = Annotated[
    datetime | None,
    typer.Option("--from", formats=["%Y-%m-%d"], help="The first day (UTC); default: from now on."),
]


@app.command()
def publish(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], home: HomeOption = None
) -> None:
    """Store a plan as a new version; an unchanged plan stays the version it is."""
    try:
        plan = read_plan(file)
    except (ValueError, yaml.YAMLError) as error:
        raise OperatorError(f"{file}: {error}") from None
    version = Prices(open_store(settings_of(home))).publish(plan, at=now(), actor=command_actor())
    console.print(f"published [bold]{version.label}[/]")


@app.command()
def assign(
    tenant: str,
    plan: str,
    from_: FromOption = None,
    home: HomeOption = None,
) -> None:
    """Put a tenant on a plan: on its newest version that may be paid by then."""
    begin, since = _begin(from_)
    version = Prices(open_store(settings_of(home))).subscribe(tenant, plan, at=begin, actor=command_actor())
    console.print(f"{tenant} pays [bold]{version.label}[/] from {since} on")


@app.command()
def end(
    tenant: str,
    from_: FromOption = None,
    home: HomeOption = None,
) -> None:
    """End what a tenant pays: its requests are refused until it is put on a plan again."""
    begin, since = _begin(from_)
    version = Prices(open_store(settings_of(home))).end(tenant, at=begin, actor=command_actor())
    console.print(f"{tenant} pays [bold]{version.label}[/] no more from {since} on")


@app.command("list")
def index(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List every version of every plan, with prices per million tokens in the plan's currency."""
    versions = Prices(open_store(settings_of(home))).versions()
    if as_json:
        from serve.api.admin.prices import wire

        return print_list(versions, wire)
    rows = Table("!plan", "model", ">prompt", ">cached prompt", ">completion", ">cold load", "currency")
    for version in versions:
        for kind, rates in _kinds(version.plan):
            classes = (
                rates.prompt_nanos_per_mtok,
                rates.cached_prompt_nanos_per_mtok,
                rates.completion_nanos_per_mtok,
                rates.cold_load_nanos,
            )
            rows.add_row(
                version.label,
                kind,
                *(_price(price, version.plan.currency) for price in classes),
                version.plan.currency,
            )
    console.print(rows)


def _begin(first_day: datetime | None) -> tuple[datetime, str]:
    """Return the day's midnight, or now, and its name. Raises OperatorError for the past."""
    at = now()
    if first_day is None:
        return at, "now"
    begin = first_day.replace(tzinfo=UTC)
    if begin < at:
        raise OperatorError("The past keeps its price: name a day that is to come.")
    return begin, f"{begin:%Y-%m-%d}"


def _kinds(plan: PricePlan) -> list[tuple[str, Rates | TieredRates]]:
    kinds = [("base", plan.base), ("adapter", plan.adapter)]
    if plan.batch is not None:
        kinds += [("base, batch", plan.batch.base), ("adapter, batch", plan.batch.adapter)]
    for name, own in plan.models.items():
        kinds.append((name, own.direct))
        if own.batch is not None:
            kinds.append((f"{name}, batch", own.batch))
    return kinds


def _price(price: "int | Graduated | Volume | Package", currency: str) -> str:
    match price:
        case Graduated(graduated=steps) | Volume(volume=steps):
            each = (
                exact(s.nanos_per_mtok, currency)
                + ("" if s.up_to_tokens is None else f" up to {s.up_to_tokens:,}")
                for s in steps
            )
            return f"{'graduated' if isinstance(price, Graduated) else 'volume'}: " + ", ".join(each)
        case Package(package=size):
            return f"{exact(size.nanos, currency)} a package of {size.tokens:,}"
        case _:
            return exact(price, currency)
