"""`bespoke project`: the projects into which a tenant divides its keys."""

import typer

from serve.commands.common import HomeOption, console, now, settings_of, table
from serve.commands.key import minute
from serve.commands.tenant import tenants_of
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)


@app.command()
def create(tenant: str, name: str, home: HomeOption = None) -> None:
    """Create a project; keys are put into it by its id."""
    project = tenants_of(settings_of(home)).projects.create(tenant, name, at=now(), actor=command_actor())
    console.print(f"created [bold]{project.id}[/], the project {name} of {tenant}", highlight=False)


@app.command("list")
def index(tenant: str, home: HomeOption = None) -> None:
    """A tenant's projects."""
    rows = table("!project", "name", "created", "archived")
    for project in tenants_of(settings_of(home)).projects.page(tenant).items:
        rows.add_row(project.id, project.name, minute(project.created_at), minute(project.archived_at))
    console.print(rows)


@app.command()
def archive(tenant: str, project: str, home: HomeOption = None) -> None:
    """Let a project's keys work no longer, for good."""
    tenants_of(settings_of(home)).projects.archive(tenant, project, at=now(), actor=command_actor())
    console.print(f"archived [bold]{project}[/]: its keys work no longer")
