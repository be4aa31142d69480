"""The settings, the store, the time, the console and the JSON output, which all commands share."""

import signal
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console

from serve.errors import OperatorError
from serve.formats.errors import validation_text
from serve.settings import Settings, load_settings
from serve.storage.database import Store
from serve.storage.pagination import Page

if TYPE_CHECKING:
    from serve.api.pagination import Identified

Item = TypeVar("Item")

# Lines are not wrapped here: a terminal wraps them itself, and what is copied from it stays one word.
console = Console(soft_wrap=True, highlight=False)

HomeOption = Annotated[Path | None, typer.Option("--home", help="State folder; default $BESPOKE_HOME.")]
ProfileOption = Annotated[
    Path | None, typer.Option("--config", exists=True, dir_okay=False, help="A profile: configs/serve/*.yaml")
]
InvoiceArgument = Annotated[
    str, typer.Argument(help="INV-2026-000001, or the number of a draft: acme-2026-11-r1.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, in the shape of the admin API.")]


def settings_of(home: Path | None, profile: Path | None = None, **overrides: object) -> Settings:
    """Raises OperatorError listing every setting that is wrong."""
    try:
        return load_settings(profile, home=home, **overrides)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [f"{'.'.join(str(part) for part in e['loc'])}: {validation_text(e)}" for e in details]
        raise OperatorError("Wrong settings:\n  " + "\n  ".join(lines)) from None


def open_store(settings: Settings) -> Store:
    """The migrated store."""
    store = Store(settings.store_url)
    store.migrate()
    return store


def gateway_url(settings: Settings) -> str:
    """Return the URL at which this machine reaches the gateway that these settings start.

    Raises OperatorError if the settings leave the port to the operating system.
    """
    if settings.port == 0:
        raise OperatorError("The port is set to 0, which means any free one: name the gateway with --url.")
    # A wildcard is an address to listen on, and not one to connect to.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def now() -> datetime:
    return datetime.now(UTC)


def minute(at: datetime | None) -> str:
    """A time in UTC to the minute; nothing for None."""
    return f"{at:%Y-%m-%d %H:%M}" if at else ""


def interrupted() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set from now on, instead of ending the process."""
    event = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: event.set())
    return event


def print_json(model: BaseModel) -> None:
    """Prints one JSON object to stdout, as the HTTP API would answer it."""
    typer.echo(model.model_dump_json(indent=2, by_alias=True))


def print_list(page: Page[Item] | Sequence[Item], wire: "Callable[[Item], Identified]") -> None:
    """Prints the items as the admin API's list object, each as `wire` shapes it."""
    from serve.api.pagination import listing

    print_json(listing(page if isinstance(page, Page) else Page(page, False), wire))
