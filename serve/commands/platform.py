"""`bespoke platform`: the operator's own keys, which open the admin API and all tenants' billing."""

import typer
from rich.markup import escape

from serve.commands.common import HomeOption, JsonOption, console, minute, now, print_list, settings_of
from serve.commands.key import ExpiresOption, duration, state
from serve.commands.tables import Table
from serve.commands.tenant import tenants_of
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)
key_app = typer.Typer(no_args_is_help=True)
app.add_typer(key_app, name="key", help="Create, list and revoke platform keys.")


@app.callback()
def root() -> None:
    """Platform keys, for the admin API."""


@key_app.command()
def create(name: str, expires: ExpiresOption = None, home: HomeOption = None) -> None:
    """Create a platform key. It is shown once: only a keyed hash of it is stored."""
    at = now()
    try:
        expires_at = at + duration(expires) if expires else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    key, secret = tenants_of(settings_of(home)).platform_keys.create(
        name, at=at, expires_at=expires_at, actor=command_actor()
    )
    console.print(f"created [bold]{key.id}[/] for {escape(name)}; shown only now:")
    console.print(secret)


@key_app.command("list")
def index(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List the platform keys, without their secrets."""
    page = tenants_of(settings_of(home)).platform_keys.page()
    if as_json:
        from serve.api.admin.platform_keys import wire

        return print_list(page, wire)
    rows = Table("key", "name", "ends in", "created", "state", "last used")
    for key in page.items:
        ends = state(key.expires_at, key.revoked_at)
        used = minute(key.last_used_at)
        rows.add_row(key.id, key.name, f"…{key.hint}", minute(key.created_at), ends, used)
    console.print(rows)


@key_app.command()
def revoke(key: str, home: HomeOption = None) -> None:
    """Revoke a platform key by its id; every gateway refuses it within two seconds."""
    tenants_of(settings_of(home)).platform_keys.revoke(key, at=now(), actor=command_actor())
    console.print(f"revoked [bold]{key}[/]")
