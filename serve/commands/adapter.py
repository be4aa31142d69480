"""`bespoke adapter`: which published versions are served, and which one an alias means."""

from pathlib import Path
from typing import Annotated

import typer
from rich import filesize
from rich.markup import escape

from finetune.card import read_card
from serve.commands.common import (
    HomeOption,
    ProfileOption,
    console,
    now,
    open_store,
    settings_of,
    table,
)
from serve.errors import OperatorError, UnknownRecord
from serve.registry.registry import AdapterRegistry, newest_published
from serve.registry.versions import AdapterVersion, VersionInfo, VersionState
from serve.settings import Settings
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)

PublishedArgument = Annotated[
    str, typer.Argument(help="tenant/name for its newest version, or tenant/name@version")
]
VersionArgument = Annotated[str, typer.Argument(help="tenant/name@version")]


@app.command()
def register(model: PublishedArgument, config: ProfileOption = None, home: HomeOption = None) -> None:
    """Check a published version and let the engines probe it. Again, it changes nothing."""
    settings = settings_of(home, config)
    registry = _registry(settings)
    adapter = _register(registry, settings, model)
    console.print(f"registered {adapter.model}: {registry.state(adapter)}", highlight=False)


@app.command()
def promote(model: PublishedArgument, config: ProfileOption = None, home: HomeOption = None) -> None:
    """Register a published version and let its alias mean it. Requests in flight keep theirs."""
    settings = settings_of(home, config)
    registry = _registry(settings)
    adapter = _register(registry, settings, model)
    registry.promote(adapter, at=now(), actor=command_actor())
    ready = registry.state(adapter) == VersionState.READY
    means = "now means" if ready else "will mean, once an engine has probed it,"
    console.print(f"[bold]{adapter.tenant}/{adapter.name}[/] {means} {adapter.model}", highlight=False)


@app.command("list")
def index(tenant: Annotated[str | None, typer.Argument()] = None, home: HomeOption = None) -> None:
    """Every registered version; the one that its alias means now, or will mean once it is probed."""
    rows = table("!model", "base", ">rank", ">size", "state", "pinned", "alias")
    for entry in _registry(settings_of(home)).entries(tenant):
        rows.add_row(
            entry.ref.model,
            entry.base,
            *_rank_and_size(entry),
            _state(entry),
            "yes" if entry.pinned else "",
            entry.alias or "",
        )
    console.print(rows)


@app.command()
def show(model: VersionArgument, home: HomeOption = None) -> None:
    """All that is known of a version; if it was rejected, why."""
    registry, adapter = _registered(model, home)
    entry = registry.entry(adapter)
    rank, size = _rank_and_size(entry)
    rows = table("model", entry.ref.model)
    for name, value in (
        ("base", entry.base),
        ("rank", rank),
        ("size", size),
        ("state", _state(entry)),
        ("reason", escape(entry.reason or "")),
        ("pinned", "yes" if entry.pinned else "no"),
        ("alias", entry.alias or "no"),
        ("registered", f"{entry.registered_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("probed", f"{entry.probed_at:%Y-%m-%d %H:%M:%S} UTC" if entry.probed_at else ""),
        ("retired", f"{entry.retired_at:%Y-%m-%d %H:%M:%S} UTC" if entry.retired_at else ""),
    ):
        if value:
            rows.add_row(name, value)
    console.print(rows)


@app.command()
def pin(model: VersionArgument, home: HomeOption = None) -> None:
    """Let every replica keep a version loaded."""
    registry, adapter = _registered(model, home)
    registry.pin(adapter, True, actor=command_actor())
    console.print(f"every replica keeps {adapter.model} loaded", highlight=False)


@app.command()
def unpin(model: VersionArgument, home: HomeOption = None) -> None:
    """Let replicas unload a version when others need its place."""
    registry, adapter = _registered(model, home)
    registry.pin(adapter, False, actor=command_actor())
    console.print(f"replicas may unload {adapter.model}", highlight=False)


@app.command()
def retire(model: VersionArgument, home: HomeOption = None) -> None:
    """Serve a version no longer, for good. Not while its alias points to it."""
    registry, adapter = _registered(model, home)
    registry.retire(adapter, now(), actor=command_actor())
    console.print(f"{adapter.model} is served no longer", highlight=False)


def _registry(settings: Settings) -> AdapterRegistry:
    return AdapterRegistry(open_store(settings), settings.bases)


def _register(registry: AdapterRegistry, settings: Settings, model: str) -> AdapterVersion:
    directory = _published(settings, model)
    return registry.register(
        directory,
        at=now(),
        base_dir=settings.bases_dir / read_card(directory).base,
        max_rank=settings.engine.max_lora_rank,
        actor=command_actor(),
    )


def _published(settings: Settings, model: str) -> Path:
    tenant, name, version = _parts(model)
    directory = newest_published(settings.adapters_dir, tenant, name)
    if version:
        directory = directory.with_name(version)
        if not version.isalnum() or not directory.is_dir():
            raise UnknownRecord(f"There is no published version '{model}'.")
    return directory


def _registered(model: str, home: Path | None) -> tuple[AdapterRegistry, AdapterVersion]:
    tenant, name, version = _parts(model)
    if not version:
        raise OperatorError(f"'{model}' names no version: say tenant/name@version.")
    registry = _registry(settings_of(home))
    return registry, registry.find(tenant, name, version)


def _parts(model: str) -> tuple[str, str, str]:
    tenant, _, rest = model.partition("/")
    name, _, version = rest.partition("@")
    return tenant, name, version


def _state(entry: VersionInfo) -> str:
    return f"{entry.state}, retired" if entry.retired_at else str(entry.state)


def _rank_and_size(entry: VersionInfo) -> tuple[str, str]:
    return str(entry.rank or ""), "" if entry.bytes is None else filesize.decimal(entry.bytes)
