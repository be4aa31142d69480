"""`bespoke audit`: who did what."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from serve.audit import Audit
from serve.commands.parts import HomeOption, console, open_store, settings_of, table

app = typer.Typer()


@app.command()
def audit(
    tenant: Annotated[str | None, typer.Option(help="Only what concerns this tenant.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this, say key.create.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 50,
    home: HomeOption = None,
) -> None:
    """Show the audit log, newest first."""
    rows = table("time (UTC)", "actor", "action", "tenant", "subject", "details")
    log = Audit(open_store(settings_of(home)))
    for entry in log.entries(tenant=tenant, action=action, limit=limit):
        details = json.dumps(entry.details) if entry.details else ""
        rows.add_row(
            f"{entry.at:%Y-%m-%d %H:%M:%S}",
            escape(entry.actor),
            entry.action,
            entry.tenant or "",
            entry.subject,
            escape(details),
        )
    console.print(rows)
