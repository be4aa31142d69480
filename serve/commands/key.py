"""`bespoke key`: tenants' API keys."""

import re
from datetime import datetime, timedelta
from typing import Annotated

import typer

from serve.commands.common import (
    HomeOption,
    JsonOption,
    console,
    minute,
    now,
    print_json,
    print_list,
    settings_of,
)
from serve.commands.limits import (
    ConcurrentOption,
    ContextOption,
    ModelsOption,
    RequestsOption,
    TokensOption,
    UnlimitedOption,
    limits_record,
    limits_to_change,
)
from serve.commands.tables import Table
from serve.commands.tenant import tenants_of
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
ExpiresOption = Annotated[str | None, typer.Option(help="How long it works: 90d, 12h, 30m.")]


@app.command()
def create(
    tenant: str,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="inference, files, fine-tuning, billing-read or admin; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the key is for.")] = None,
    project: Annotated[str | None, typer.Option(help="The project that it belongs to, by its id.")] = None,
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
    console.print(f"created [bold]{key.id}[/] for {tenant}; shown only now:")
    console.print(secret)


@app.command("list")
def index(tenant: str, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List a tenant's keys, without their secrets."""
    tenants = tenants_of(settings_of(home))
    tenants.get(tenant)
    page = tenants.keys.page(tenant)
    if as_json:
        from serve.api.admin.keys import wire

        return print_list(page, wire)
    rows = Table("key", "name", "ends in", "scopes", "state", "last used")
    for key in page.items:
        name = " ".join(part for part in (key.name, key.project) if part)
        scopes = " ".join(sorted(key.scopes))
        rows.add_row(
            key.id,
            name,
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
    """Create a key that replaces another. The old key expires after the overlap."""
    try:
        span = duration(overlap)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    new, secret = tenants_of(settings_of(home)).keys.rotate(
        key, overlap=span, at=now(), actor=command_actor()
    )
    console.print(f"created [bold]{new.id}[/], which replaces {key}; shown only now:")
    console.print(secret)


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
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Change the limits that are named, and show all of them. The tenant's limits apply as well."""
    named = limits_to_change(
        requests_per_min, tokens_per_min, concurrent_requests, context_tokens, model, unlimited
    )
    keys = tenants_of(settings_of(home)).keys
    tenant = keys.get(key).tenant
    changed = keys.change(tenant, key, at=now(), limits=named, actor=command_actor())
    if as_json:
        from serve.api.admin.keys import wire

        return print_json(wire(changed))
    console.print(limits_record("key", key, changed.limits))


def duration(text: str) -> timedelta:
    """'90d' as a span. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise ValueError(f"'{text}' is no span of time: write 90d, 12h, 30m or 45s")
    return timedelta(seconds=int(match[1]) * UNITS[match[2]])


def state(expires_at: datetime | None, revoked_at: datetime | None) -> str:
    """Says of a key whether it works, and until when."""
    if revoked_at is not None:
        return f"revoked {minute(revoked_at)}"
    if expires_at is None:
        return "works"
    return f"{'works until' if expires_at > now() else 'expired'} {minute(expires_at)}"
