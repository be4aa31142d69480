"""`bespoke audit`: the log of changes, with the actor of each."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from serve.commands.common import HomeOption, JsonOption, console, open_store, print_list, settings_of
from serve.storage.pagination import Page
from serve.tenants.audit import Audit

app = typer.Typer()


@app.command()
def audit(
    tenant: Annotated[str | None, typer.Option(help="Only entries about this tenant.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this action, such as key.create.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many entries at most.")] = 50,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show the audit log, newest first."""
    log = Audit(open_store(settings_of(home)))
    if as_json:
        from serve.api.admin.audit import wire

        entries = log.entries(tenant=tenant, action=action, limit=limit + 1)
        return print_list(Page(entries[:limit], len(entries) > limit), wire)
    for entry in log.entries(tenant=tenant, action=action, limit=limit):
        about = entry.subject if entry.tenant in (None, entry.subject) else f"{entry.tenant} {entry.subject}"
        details = {name: value for name, value in (entry.details or {}).items() if value is not None}
        line = f"[bold]{entry.action}[/]  {escape(about)}  by {escape(entry.actor)}"
        console.print(f"{entry.at:%Y-%m-%d %H:%M:%S}  {line}")
        if details:
            console.print(f"    {escape(json.dumps(details))}", style="dim")
