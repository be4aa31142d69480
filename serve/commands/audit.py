"""`bespoke audit`: who did what."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from serve.commands.common import HomeOption, console, open_store, settings_of
from serve.tenants.audit import Audit

app = typer.Typer()


@app.command()
def audit(
    tenant: Annotated[str | None, typer.Option(help="Only what concerns this tenant.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this, say key.create.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 50,
    home: HomeOption = None,
) -> None:
    """Show the audit log, newest first."""
    log = Audit(open_store(settings_of(home)))
    for entry in log.entries(tenant=tenant, action=action, limit=limit):
        about = entry.subject if entry.tenant in (None, entry.subject) else f"{entry.tenant} {entry.subject}"
        said = {name: value for name, value in (entry.details or {}).items() if value is not None}
        did = f"[bold]{entry.action}[/]  {escape(about)}  by {escape(entry.actor)}"
        console.print(f"{entry.at:%Y-%m-%d %H:%M:%S}  {did}", highlight=False, soft_wrap=True)
        if said:
            console.print(f"    {escape(json.dumps(said))}", style="dim", highlight=False, soft_wrap=True)
