"""The commands `bespoke data …` and `bespoke finetune …`. `--help` loads no torch."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.card import AdapterCard
    from finetune.data.data_report import DataReport
    from finetune.job import Job, JobResult

data_app = typer.Typer(help="Check and prepare customers' data.", no_args_is_help=True)
finetune_app = typer.Typer(help="Train, evaluate and publish adapters.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(metavar="FILE", help="JSONL in OpenAI's chat fine-tuning format.")]
HeldoutFraction = Annotated[
    float, typer.Option(min=0.05, max=0.5, help="Share of the rows kept for measuring.")
]
Seed = Annotated[int, typer.Option(min=0, help="Decides which questions are held out.")]
ReportAsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, as in report.json.")]


@data_app.command("check")
def data_check(
    source: Source,
    heldout_fraction: HeldoutFraction = 0.15,
    seed: Seed = 0,
    as_json: ReportAsJson = False,
) -> None:
    """Report the lines that training would keep and drop. Write nothing."""
    from finetune.data.prepare import check, require_rows

    with _one_line_errors():
        report = check(source, heldout_fraction=heldout_fraction, seed=seed)
        _print_report(report, as_json)
        require_rows(report, source)


@data_app.command("prepare")
def data_prepare(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl, heldout.jsonl and report.json.")],
    heldout_fraction: HeldoutFraction = 0.15,
    seed: Seed = 0,
    as_json: ReportAsJson = False,
) -> None:
    """Validate, clean and split a file."""
    from finetune.data.prepare import prepare

    with _one_line_errors():
        report = prepare(source, out, heldout_fraction=heldout_fraction, seed=seed)
    _print_report(report, as_json)


@finetune_app.command("run")
def finetune_run(
    job_file: Annotated[
        Path, typer.Argument(metavar="JOB.yaml", help="Tenant, adapter, base, data, recipe.")
    ],
    home: Annotated[Path, typer.Option(envvar="BESPOKE_HOME", help="Holds bases/ and adapters/.")] = Path(
        ".bespoke"
    ),
    force: Annotated[bool, typer.Option("--force", help="Train even if it is already published.")] = False,
) -> None:
    """Train an adapter, measure it on held-out rows, and publish it if it beats its base."""
    # OpenMP's threads spin while they wait, which is slow beside any other load: with one busy neighbour on
    # two cores a training step took 25 s, and 4 s with this. torch reads the variable when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Bases are local: asking a hub would cost time, or fail.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from finetune.job import load_job

    with _one_line_errors():
        result = _run_with_progress(load_job(job_file), home, force)
    if result.report:
        _print_report(result.report)
    _print_card(result.card)
    for phase, seconds in result.phase_s.items():
        typer.echo(f"{phase:<9} {seconds:6.1f} s")
    typer.echo(f"{'reused, published before' if result.reused else 'published'}: {result.directory}")


@finetune_app.command("show")
def finetune_show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A published version.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as one JSON object.")] = False,
) -> None:
    """Verify a published adapter against its card, and show the card."""
    from finetune.card import verify

    with _one_line_errors():
        card = verify(directory)
    if as_json:
        typer.echo(card.model_dump_json(indent=2))
    else:
        _print_card(card)


def _run_with_progress(job: Job, home: Path, force: bool) -> JobResult:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from finetune.job import run

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("start", total=None, detail="")

        def on_phase(name: str) -> None:
            progress.reset(task, description=name, total=None, detail="")

        def on_step(step: int, steps: int, loss: float, tokens_per_s: float) -> None:
            detail = f"step {step}/{steps}  loss {loss:.3f}  {tokens_per_s:.0f} tok/s"
            progress.update(task, completed=step, total=steps, detail=detail)

        return run(
            job,
            bases=home / "bases",
            adapters=home / "adapters",
            force=force,
            on_phase=on_phase,
            on_step=on_step,
        )


def _print_report(report: DataReport, as_json: bool = False) -> None:
    if as_json:
        typer.echo(report.to_json())
        return
    from rich.console import Console

    # The file's name stands above the table, where no column is too narrow for it.
    typer.secho(f"{report.source}: {report.rows} rows", bold=True)
    Console().print(report.to_table())


def _print_card(card: AdapterCard) -> None:
    metrics = card.metrics
    low, high = metrics.difference_ci95
    dropped = ", ".join(f"{count} {reason}" for reason, count in card.data.dropped.items())
    _print_rows(
        f"{card.tenant}/{card.adapter}@{card.version}",
        (
            ("base", card.base),
            ("base_sha256", card.base_sha256),
            ("adapter", f"rank {card.rank} on {', '.join(card.target_modules)}"),
            ("data", f"{card.data.train_rows} rows trained on, {card.data.heldout_rows} held out"),
            ("dropped", dropped or "none"),
            (
                "held-out NLL",
                f"{metrics.base_nll:.4f} base, {metrics.adapter_nll:.4f} adapter (nats a token)",
            ),
            ("difference", f"{metrics.difference:+.4f}, 95% interval [{low:+.4f}, {high:+.4f}]"),
            ("perplexity", f"{metrics.base_perplexity:.2f} base, {metrics.adapter_perplexity:.2f} adapter"),
            ("gate", f"{'passed' if card.gate.passed else 'FAILED'}: {card.gate.rule}"),
            ("created_at", f"{card.created_at:%Y-%m-%d %H:%M:%S %Z}, seed {card.seed}"),
            ("libraries", ", ".join(f"{name} {version}" for name, version in card.libraries)),
        ),
    )


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
    """Turns a FinetuneError into one line on stderr and exit status 1."""
    try:
        yield
    except FinetuneError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
