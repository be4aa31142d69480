"""`bespoke project`: the projects into which a tenant divides its keys."""

import typer

from serve.commands.common import HomeOption, JsonOption, console, minute, now, print_list, settings_of
from serve.commands.tables import Table
from serve.commands.tenant import tenants_of
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)


@app.command()
def create(tenant: str, name: str, home: HomeOption = None) -> None:
    """Create a project. `bespoke key create --project` puts keys into it, by its id."""
    project = tenants_of(settings_of(home)).projects.create(tenant, name, at=now(), actor=command_actor())
    console.print(f"created [bold]{project.id}[/], the project {name} of {tenant}")


@app.command("list")
def index(tenant: str, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List a tenant's projects."""
    tenants = tenants_of(settings_of(home))
    tenants.get(tenant)
    page = tenants.projects.page(tenant)
    if as_json:
        from serve.api.admin.projects import wire

        return print_list(page, wire)
    rows = Table("project", "name", "created", "archived")
    for project in page.items:
        rows.add_row(project.id, project.name, minute(project.created_at), minute(project.archived_at))
    console.print(rows)


@app.command()
def archive(tenant: str, project: str, home: HomeOption = None) -> None:
    """Archive a project, for good: its keys stop working."""
    tenants_of(settings_of(home)).projects.archive(tenant, project, at=now(), actor=command_actor())
    console.print(f"archived [bold]{project}[/]: its keys no longer work")
