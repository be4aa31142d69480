"""What the commands share: the store of this installation, the time, the console."""

import signal
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from serve.errors import OperatorError
from serve.settings import Settings, load_settings
from serve.storage.database import Store

console = Console()

HomeOption = Annotated[Path | None, typer.Option("--home", help="State folder; default $BESPOKE_HOME.")]
ProfileOption = Annotated[
    Path | None, typer.Option("--config", exists=True, dir_okay=False, help="A profile: configs/serve/*.yaml")
]


def settings_of(home: Path | None, profile: Path | None = None, **overrides: object) -> Settings:
    """Raises OperatorError listing every setting that is wrong."""
    try:
        return load_settings(profile, home=home, **overrides)
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors(include_url=False)]
        raise OperatorError("Wrong settings:\n  " + "\n  ".join(lines)) from None


def open_store(settings: Settings) -> Store:
    """The migrated store."""
    store = Store(settings.store_url)
    store.migrate()
    return store


def now() -> datetime:
    return datetime.now(UTC)


def interrupted() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set from now on, instead of ending the process."""
    event = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: event.set())
    return event


def table(*columns: str, title: str | None = None) -> Table:
    """A table. Columns that start with '>' are numbers, aligned right; with '!', never cut: to be copied."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        right, whole = column.startswith(">"), column.startswith("!")
        made.add_column(column.lstrip(">!"), justify="right" if right else "left", no_wrap=whole)
    return made
