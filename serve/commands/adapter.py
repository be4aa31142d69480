"""`bespoke adapter`: the versions that are served, and the one that an alias means."""

from pathlib import Path
from typing import Annotated

import typer
from rich import filesize

from finetune.card import read_card
from serve.commands.common import (
    HomeOption,
    JsonOption,
    ProfileOption,
    console,
    now,
    open_store,
    print_json,
    print_list,
    settings_of,
)
from serve.commands.tables import Table, record
from serve.commands.tenant import tenants_of
from serve.errors import OperatorError, UnknownRecord
from serve.registry.registry import AdapterRegistry, newest_published
from serve.registry.versions import AdapterVersion, VersionInfo, VersionState
from serve.settings import Settings
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)

PublishedArgument = Annotated[
    str, typer.Argument(help="tenant/name for its newest published version, or tenant/name@version.")
]
VersionArgument = Annotated[
    str, typer.Argument(help="tenant/name@version, or tenant/name for the version that this alias means.")
]


@app.command()
def register(model: PublishedArgument, config: ProfileOption = None, home: HomeOption = None) -> None:
    """Check a published version and let the engines probe it. To repeat it changes nothing."""
    settings = settings_of(home, config)
    registry = _registry(settings)
    adapter = _register(registry, settings, model)
    console.print(f"registered {adapter.model}: {registry.state(adapter)}")


@app.command()
def promote(model: PublishedArgument, config: ProfileOption = None, home: HomeOption = None) -> None:
    """Register a published version and point its alias to it. Requests in flight keep their version."""
    settings = settings_of(home, config)
    registry = _registry(settings)
    adapter = _register(registry, settings, model)
    registry.promote(adapter, at=now(), actor=command_actor())
    ready = registry.state(adapter) == VersionState.READY
    means = "now means" if ready else "will mean, once an engine has probed it,"
    console.print(f"[bold]{adapter.tenant}/{adapter.name}[/] {means} {adapter.model}")


@app.command("list")
def index(
    tenant: Annotated[str | None, typer.Argument()] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List every registered version, and the one that each alias means now or will mean next."""
    settings = settings_of(home)
    if tenant is not None:
        tenants_of(settings).get(tenant)
    entries = _registry(settings).entries(tenant)
    if as_json:
        from serve.api.admin.adapters import wire

        return print_list(entries, wire)
    rows = Table("model", "base", ">rank", ">size", "state", "pinned", "alias")
    for entry in entries:
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
def show(model: VersionArgument, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Show a version, and why it was rejected if it was. An alias shows the version that it means now."""
    registry = _registry(settings_of(home))
    versions = _meant(registry, model)
    entry = versions[0]
    if as_json:
        from serve.api.admin.adapters import wire

        return print_json(wire(entry))
    rank, size = _rank_and_size(entry)
    fields = (
        ("model", entry.ref.model),
        ("base", entry.base),
        ("rank", rank),
        ("size", size),
        ("state", _state(entry)),
        ("reason", entry.reason or ""),
        ("pinned", "yes" if entry.pinned else "no"),
        ("alias", entry.alias or "no"),
        ("alias next", versions[1].ref.model if len(versions) > 1 else ""),
        ("registered", f"{entry.registered_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("probed", f"{entry.probed_at:%Y-%m-%d %H:%M:%S} UTC" if entry.probed_at else ""),
        ("retired", f"{entry.retired_at:%Y-%m-%d %H:%M:%S} UTC" if entry.retired_at else ""),
    )
    console.print(record(fields))


@app.command()
def pin(model: VersionArgument, home: HomeOption = None) -> None:
    """Let every replica keep a version loaded."""
    registry = _registry(settings_of(home))
    adapter = _the_one_meant(registry, model)
    registry.pin(adapter, True, actor=command_actor())
    console.print(f"every replica keeps {adapter.model} loaded")


@app.command()
def unpin(model: VersionArgument, home: HomeOption = None) -> None:
    """Let replicas unload a version when others need its place."""
    registry = _registry(settings_of(home))
    adapter = _the_one_meant(registry, model)
    registry.pin(adapter, False, actor=command_actor())
    console.print(f"replicas may unload {adapter.model}")


@app.command()
def retire(model: VersionArgument, home: HomeOption = None) -> None:
    """Stop serving a version, for good. Refused while its alias points to it."""
    registry = _registry(settings_of(home))
    adapter = _the_one_meant(registry, model)
    registry.retire(adapter, now(), actor=command_actor())
    console.print(f"{adapter.model} is no longer served")


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
    tenant, name, version = _split(model)
    directory = newest_published(settings.adapters_dir, tenant, name)
    if version:
        directory = directory.with_name(version)
        if not version.isalnum() or not directory.is_dir():
            raise UnknownRecord(f"There is no published version '{model}'.")
    return directory


def _the_one_meant(registry: AdapterRegistry, model: str) -> AdapterVersion:
    """The version to change. Prints which one it is, if `model` is an alias.

    Raises OperatorError, naming both versions, while an alias is about to change its meaning.
    """
    versions = [entry.ref for entry in _meant(registry, model)]
    if len(versions) > 1:
        raise OperatorError(
            f"'{model}' means {versions[0].model} now and {versions[1].model} once it is probed: name one."
        )
    if "@" not in model:
        console.print(f"{model} is {versions[0].model}")
    return versions[0]


def _meant(registry: AdapterRegistry, model: str) -> list[VersionInfo]:
    """The version that is named; of an alias, the version that it means now and then the next one.

    Raises UnknownRecord for a version that is not registered, OperatorError for an alias that means none.
    """
    tenant, name, version = _split(model)
    if "@" in model:
        return [registry.entry(registry.find(tenant, name, version))]
    entries = [entry for entry in registry.entries(tenant) if entry.ref.name == name]
    if not entries:
        raise UnknownRecord(f"No version of '{model}' is registered.")
    versions = sorted((entry for entry in entries if entry.alias), key=lambda entry: entry.alias == "next")
    if not versions:
        names = ", ".join(entry.ref.model for entry in entries)
        raise OperatorError(f"The alias '{model}' means no version: promote or name one of {names}.")
    return versions


def _split(model: str) -> tuple[str, str, str]:
    """Tenant, adapter and version; the version is empty where none is named."""
    tenant, _, rest = model.partition("/")
    name, _, version = rest.partition("@")
    return tenant, name, version


def _state(entry: VersionInfo) -> str:
    return f"{entry.state}, retired" if entry.retired_at else str(entry.state)


def _rank_and_size(entry: VersionInfo) -> tuple[str, str]:
    return str(entry.rank or ""), "" if entry.bytes is None else filesize.decimal(entry.bytes)
