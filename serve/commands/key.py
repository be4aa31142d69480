"""`bespoke key`: tenants' API keys."""

import re
from datetime import datetime, timedelta
from typing import Annotated

import typer
from rich.markup import escape

from serve.commands.common import HomeOption, console, now, settings_of, table
from serve.commands.limits import (
    ConcurrentOption,
    ContextOption,
    ModelsOption,
    RequestsOption,
    TokensOption,
    UnlimitedOption,
    limits_table,
    limits_to_change,
)
from serve.commands.tenant import tenants_of
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
ExpiresOption = Annotated[str | None, typer.Option(help="From now: 90d, 12h, 30m.")]


@app.command()
def create(
    tenant: str,
    scope: Annotated[
        list[str] | None, typer.Option(help="inference, files, fine-tuning, billing-read, admin")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the key is for.")] = None,
    project: Annotated[str | None, typer.Option(help="Of which of the tenant's projects, by its id.")] = None,
    expires: ExpiresOption = None,
    home: HomeOption = None,
) -> None:
    """Create a key. It is shown once: only a keyed hash of it is stored."""
    at = now()
    try:
        key, secret = tenants_of(settings_of(home)).keys.create(
            tenant,
            at=at,
            scopes=frozenset(scope or ["inference"]),
            name=name,
            project=project,
            expires_at=at + duration(expires) if expires else None,
            actor=command_actor(),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(f"created [bold]{key.id}[/] for {tenant}; shown only now:", highlight=False)
    console.print(secret, highlight=False, soft_wrap=True)


@app.command("list")
def index(tenant: str, home: HomeOption = None) -> None:
    """A tenant's keys, without their secrets."""
    rows = table("!key", "name", "!ends in", "scopes", "state", "last used")
    for key in tenants_of(settings_of(home)).keys.page(tenant).items:
        name = " ".join(part for part in (key.name, key.project) if part)
        scopes = " ".join(sorted(key.scopes))
        rows.add_row(
            key.id,
            escape(name),
            f"…{key.hint}",
            scopes,
            state(key.expires_at, key.revoked_at),
            minute(key.last_used_at),
        )
    console.print(rows)


@app.command()
def rotate(
    key: str,
    overlap: Annotated[str, typer.Option(help="How long the old key still works: 0s to 30d.")] = "24h",
    home: HomeOption = None,
) -> None:
    """Create a key that follows another, which expires after the overlap."""
    try:
        span = duration(overlap)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    new, secret = tenants_of(settings_of(home)).keys.rotate(
        key, overlap=span, at=now(), actor=command_actor()
    )
    console.print(f"created [bold]{new.id}[/], which follows {key}; shown only now:", highlight=False)
    console.print(secret, highlight=False, soft_wrap=True)


@app.command()
def revoke(key: str, home: HomeOption = None) -> None:
    """Revoke a key by its id; every gateway refuses it within two seconds."""
    tenants_of(settings_of(home)).keys.revoke(key, at=now(), actor=command_actor())
    console.print(f"revoked [bold]{key}[/]")


@app.command()
def limits(
    key: str,
    requests_per_min: RequestsOption = None,
    tokens_per_min: TokensOption = None,
    concurrent_requests: ConcurrentOption = None,
    context_tokens: ContextOption = None,
    model: ModelsOption = None,
    unlimited: UnlimitedOption = None,
    home: HomeOption = None,
) -> None:
    """Change the limits that are named, and show all of them. The tenant's hold besides."""
    named = limits_to_change(
        requests_per_min, tokens_per_min, concurrent_requests, context_tokens, model, unlimited
    )
    keys = tenants_of(settings_of(home)).keys
    tenant = keys.get(key).tenant
    changed = keys.change(tenant, key, at=now(), limits=named, actor=command_actor())
    console.print(limits_table(key, changed.limits))


def duration(text: str) -> timedelta:
    """'90d' as a span. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise ValueError(f"'{text}' is no span of time: say 90d, 12h, 30m or 45s")
    return timedelta(seconds=int(found[1]) * UNITS[found[2]])


def minute(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M}" if at else ""


def state(expires_at: datetime | None, revoked_at: datetime | None) -> str:
    """How a key stands."""
    if revoked_at is not None:
        return f"revoked {minute(revoked_at)}"
    if expires_at is None:
        return "works"
    return f"{'works until' if expires_at > now() else 'expired'} {minute(expires_at)}"
