"""`bespoke base …` and `bespoke quantize …`. torch is imported by work that needs it, not by `--help`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from quantize.base import import_base
from quantize.card import BaseCard, read_card, verify
from quantize.errors import CardMissing, GateFailed, QuantizeError, ReportMissing
from quantize.progress import OnProgress
from quantize.report import render_table
from quantize.run import quantize
from quantize.spec import BaseSpec, QuantizeSpec, read_spec
from quantize.store import base_dir, rejected_dir
from quantize.text import load_text

base_app = typer.Typer(help="Import and inspect base models.", no_args_is_help=True)
quantize_app = typer.Typer(help="Quantize base models, and read what it cost.", no_args_is_help=True)

Home = Annotated[Path, typer.Option("--home", envvar="BESPOKE_HOME", help="Where Bespoke keeps its state.")]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="A file under configs/.")]
BaseArgument = Annotated[str, typer.Argument(metavar="NAME", help="A base's name.")]
DEFAULT_HOME = Path(".bespoke")

_out = Console()
_err = Console(stderr=True, soft_wrap=True)


@base_app.command("import")
def import_command(spec_file: SpecFile, home: Home = DEFAULT_HOME) -> None:
    """Make a base from its YAML file: configs/bases/smollm2-135m.yaml, for example."""
    with _one_line_errors():
        spec = read_spec(spec_file, BaseSpec)
        with _progress() as on_progress:
            directory = import_base(spec, home / "bases", on_progress)
        _out.print(f"[bold]{spec.name}[/] is in {escape(str(directory))}")


@base_app.command("show")
def show_command(name: BaseArgument, home: Home = DEFAULT_HOME) -> None:
    """Check every byte of a base against its card, and print the card."""
    with _one_line_errors():
        card = verify(base_dir(home / "bases", name))
        table = Table(title=f"{card.name}: intact", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for field, value in card.model_dump(mode="json", exclude={"report", "files_sha256"}).items():
            table.add_row(field, escape(str(value)))
        _out.print(table)
        if card.report is not None:
            _out.print(render_table(card, card.report))


@quantize_app.command("run")
def run_command(
    spec_file: SpecFile,
    base: Annotated[str, typer.Option("--base", help="The base to quantize.")],
    text: Annotated[
        str | None, typer.Option("--text", help="Measure on this UTF-8 file instead of the YAML's text.")
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Quantize a base, measure its perplexity before and after, and publish it if it passes its gate."""
    with _one_line_errors():
        spec = read_spec(spec_file, QuantizeSpec)
        bases_root = home / "bases"
        parent_dir = base_dir(bases_root, base)
        evaluation_text = load_text(text or spec.text)
        try:
            with _progress() as on_progress:
                card = quantize(parent_dir, spec, evaluation_text, bases_root, on_progress)
        except GateFailed as failure:
            _print_report(read_card(rejected_dir(bases_root, failure.name)))
            raise
        _print_report(card)
        _out.print(f"[bold]{card.name}[/] is in {escape(str(base_dir(bases_root, card.name)))}")


@quantize_app.command("report")
def report_command(name: BaseArgument, home: Home = DEFAULT_HOME) -> None:
    """Print what quantizing a base cost; also of one that its gate refused."""
    with _one_line_errors():
        bases_root = home / "bases"
        try:
            card = read_card(base_dir(bases_root, name))
        except CardMissing:
            card = read_card(rejected_dir(bases_root, name))
        _print_report(card)


def _print_report(card: BaseCard) -> None:
    if card.report is None:
        raise ReportMissing(card.name)
    _out.print(render_table(card, card.report))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn a QuantizeError into one line on stderr and exit status 1."""
    try:
        yield
    except QuantizeError as error:
        _err.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """One bar on stderr, and silence and no network from the libraries (they read these on first import)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda stage, fraction: bar.update(task, description=stage, completed=fraction)
