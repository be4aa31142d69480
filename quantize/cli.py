"""The commands `bespoke base …` and `bespoke quantize …`. `--help` loads no torch."""

import json
import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from quantize.base_import import import_base
from quantize.card import BaseCard, read_card, verify
from quantize.config import BaseConfig, QuantizeConfig, read_config
from quantize.errors import CardMissing, GateFailed, QuantizeError, ReportMissing
from quantize.eval_text import load_eval_text
from quantize.progress import OnProgress
from quantize.report import report_json, report_rows
from quantize.run import quantize
from quantize.store import base_dir, rejected_dir

base_app = typer.Typer(help="Import and inspect base models.", no_args_is_help=True)
quantize_app = typer.Typer(help="Quantize base models, and read what it cost.", no_args_is_help=True)

Home = Annotated[Path, typer.Option("--home", envvar="BESPOKE_HOME", help="Where Bespoke keeps its state.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A file under configs/.")]
BaseArgument = Annotated[str, typer.Argument(metavar="NAME", help="A base's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, with the card's field names.")]
DEFAULT_HOME = Path(".bespoke")

_err = Console(stderr=True, soft_wrap=True)


@base_app.command("import")
def import_command(config_file: ConfigFile, home: Home = DEFAULT_HOME) -> None:
    """Make a base from its YAML file: configs/bases/smollm2-135m.yaml, for example."""
    with _one_line_errors():
        config = read_config(config_file, BaseConfig)
        with _progress() as on_progress:
            directory = import_base(config, home / "bases", on_progress)
        typer.echo(f"{config.name} is in {directory}")


@base_app.command("show")
def show_command(name: BaseArgument, home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Check every byte of a base against its card, and print the card."""
    with _one_line_errors():
        card = verify(base_dir(home / "bases", name))
        if as_json:
            typer.echo(card.model_dump_json(indent=2))
            return
        fields = card.model_dump(mode="json", exclude={"report", "files_sha256"})
        _print_rows(f"{card.name}: intact", ((field, str(value)) for field, value in fields.items()))
        if card.report is not None:
            typer.echo()
            _print_report(card)


@quantize_app.command("run")
def run_command(
    config_file: ConfigFile,
    base: Annotated[str, typer.Option("--base", help="The base to quantize.")],
    text: Annotated[
        str | None, typer.Option("--text", help="Measure on this UTF-8 file instead of the YAML's text.")
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Quantize a base, measure its perplexity before and after, and publish it if it passes its gate."""
    with _one_line_errors():
        config = read_config(config_file, QuantizeConfig)
        bases_root = home / "bases"
        parent_dir = base_dir(bases_root, base)
        evaluation_text = load_eval_text(text or config.text)
        try:
            with _progress() as on_progress:
                card = quantize(parent_dir, config, evaluation_text, bases_root, on_progress)
        except GateFailed as failure:
            _print_report(read_card(rejected_dir(bases_root, failure.name)))
            raise
        _print_report(card)
        typer.echo(f"{card.name} is in {base_dir(bases_root, card.name)}")


@quantize_app.command("report")
def report_command(name: BaseArgument, home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Print what quantizing a base cost; also of one that its gate refused."""
    with _one_line_errors():
        bases_root = home / "bases"
        try:
            card = read_card(base_dir(bases_root, name))
        except CardMissing:
            card = read_card(rejected_dir(bases_root, name))
        if as_json and card.report is not None:
            typer.echo(json.dumps(report_json(card), indent=2, ensure_ascii=False))
            return
        _print_report(card)


def _print_report(card: BaseCard) -> None:
    if card.report is None:
        raise ReportMissing(card.name)
    _print_rows(f"Quantization of {card.parent}", report_rows(card, card.report))


def _print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Prints labels and values in two columns, wrapped between words.

    Names, hashes and paths are never cut or split, however narrow the terminal is: people copy them.
    """
    rows = list(rows)
    indent = max(len(label) for label, _ in rows) + 2
    typer.secho(title, bold=True)
    for label, value in rows:
        line = textwrap.fill(
            value,
            max(shutil.get_terminal_size().columns, indent + 20),
            initial_indent=f"{label:<{indent}}",
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        typer.echo(line or label)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns a QuantizeError into one line on stderr and exit status 1."""
    try:
        yield
    except QuantizeError as error:
        _err.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """Shows one progress bar on stderr, and keeps the libraries off the network and silent.

    The libraries read these variables when they are first imported.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda stage, fraction: bar.update(task, description=stage, completed=fraction)
