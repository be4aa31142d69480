"""`bespoke adapter`: which published versions are served, and which one an alias means."""

from typing import Annotated

import typer

from serve.adapters import Catalogue, newest_published
from serve.commands.parts import HomeOption, console, now, open_store, settings_of, table
from serve.errors import UnknownRecord
from serve.tenants import Tenants, server_secret

app = typer.Typer(no_args_is_help=True)


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="tenant/name for its newest version, or tenant/name@version")],
    home: HomeOption = None,
) -> None:
    """Register a published version and let its alias mean it. Requests in flight keep theirs."""
    settings = settings_of(home)
    tenant, _, rest = model.partition("/")
    name, _, version = rest.partition("@")
    directory = newest_published(settings.adapters_dir, tenant, name)
    if version:
        directory = directory.with_name(version)
        if not version.isalnum() or not directory.is_dir():
            raise UnknownRecord(f"There is no published version '{model}'.")
    catalogue = Catalogue(open_store(settings), settings.bases)
    adapter = catalogue.register(directory, at=now())
    catalogue.promote(adapter, at=now())
    console.print(f"[bold]{tenant}/{name}[/] now means {adapter.model}", highlight=False)


@app.command("list")
def index(tenant: Annotated[str | None, typer.Argument()] = None, home: HomeOption = None) -> None:
    """What each tenant, or one of them, can name as a model."""
    settings = settings_of(home)
    store = open_store(settings)
    catalogue = Catalogue(store, settings.bases)
    rows = table("tenant", "model", "base", "version")
    for owner in [tenant] if tenant else Tenants(store, server_secret(settings.home)).names():
        for model in catalogue.models(owner):
            rows.add_row(owner, model.name, model.base, model.adapter.version if model.adapter else "")
    console.print(rows)
