"""`bespoke price`: price plans."""

from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import ValidationError

from serve.audit import command_actor
from serve.billing.money import usd
from serve.billing.pricing import Prices, read_plan
from serve.commands.parts import HomeOption, console, now, open_store, settings_of, table
from serve.errors import OperatorError

app = typer.Typer(no_args_is_help=True)


@app.command()
def publish(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], home: HomeOption = None
) -> None:
    """Store a plan as a new version; an unchanged plan stays the version it is."""
    try:
        plan = read_plan(file)
    except (ValidationError, yaml.YAMLError) as error:
        raise OperatorError(f"{file}: {error}") from None
    version = Prices(open_store(settings_of(home))).publish(plan, at=now(), actor=command_actor())
    console.print(f"published [bold]{version.label}[/]")


@app.command()
def assign(tenant: str, plan: str, home: HomeOption = None) -> None:
    """Put a tenant on the newest version of a plan, from now on."""
    version = Prices(open_store(settings_of(home))).subscribe(tenant, plan, at=now(), actor=command_actor())
    console.print(f"{tenant} pays [bold]{version.label}[/] from now on")


@app.command("list")
def index(home: HomeOption = None) -> None:
    """Every version of every plan; prices in USD per million tokens."""
    rows = table("plan", "model", ">prompt", ">cached prompt", ">completion")
    for version in Prices(open_store(settings_of(home))).versions():
        plan = version.plan
        kinds = [("base", plan.base), ("adapter", plan.adapter)]
        if plan.batch is not None:
            kinds += [("base, batch", plan.batch.base), ("adapter, batch", plan.batch.adapter)]
        for kind, rates in kinds:
            rows.add_row(version.label, kind, *(usd(value) for value in rates.model_dump().values()))
    console.print(rows)
