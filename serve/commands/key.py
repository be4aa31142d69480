"""`bespoke key`: API keys."""

from typing import Annotated

import typer

from serve.commands.parts import HomeOption, console, now, open_store, settings_of, table
from serve.settings import Settings
from serve.tenants import Tenants, server_secret

app = typer.Typer(no_args_is_help=True)


def _tenants(settings: Settings) -> Tenants:
    return Tenants(open_store(settings), server_secret(settings.home))


@app.command()
def create(
    tenant: str,
    scope: Annotated[list[str] | None, typer.Option(help="inference, billing-read")] = None,
    home: HomeOption = None,
) -> None:
    """Create a key. It is shown once: only a keyed hash of it is stored."""
    try:
        key, secret = _tenants(settings_of(home)).create_key(
            tenant, at=now(), scopes=frozenset(scope or ["inference"])
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(f"created [bold]{key.id}[/] for {tenant}; shown only now:", highlight=False)
    console.print(secret, highlight=False, soft_wrap=True)


@app.command("list")
def index(tenant: str, home: HomeOption = None) -> None:
    """A tenant's keys, without their secrets."""
    rows = table("key", "ends in", "scopes", "created", "revoked")
    for key in _tenants(settings_of(home)).keys(tenant):
        revoked = f"{key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else ""
        rows.add_row(
            key.id, f"…{key.hint}", " ".join(sorted(key.scopes)), f"{key.created_at:%Y-%m-%d %H:%M}", revoked
        )
    console.print(rows)


@app.command()
def revoke(key: str, home: HomeOption = None) -> None:
    """Revoke a key by its id; the next request with it gets 401."""
    _tenants(settings_of(home)).revoke_key(key, at=now())
    console.print(f"revoked [bold]{key}[/]")
