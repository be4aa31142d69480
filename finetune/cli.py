"""`bespoke data …` and `bespoke finetune …`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from rich.table import Table

    from finetune.card import AdapterCard
    from finetune.job import Job, JobResult

data_app = typer.Typer(help="Check and prepare customers' data.", no_args_is_help=True)
finetune_app = typer.Typer(help="Train, evaluate and publish adapters.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(metavar="FILE", help="JSONL in OpenAI's chat fine-tuning format.")]
HeldoutFraction = Annotated[
    float, typer.Option(min=0.05, max=0.5, help="Share of the rows kept for measuring.")
]
Seed = Annotated[int, typer.Option(min=0, help="Decides which questions are held out.")]


@data_app.command("check")
def data_check(source: Source, heldout_fraction: HeldoutFraction = 0.15, seed: Seed = 0) -> None:
    """Say what would become of every line, and write nothing."""
    from finetune.data.prepare import check, require_rows

    with _one_line_errors():
        report = check(source, heldout_fraction=heldout_fraction, seed=seed)
        _show(report.to_table())
        require_rows(report, source)


@data_app.command("prepare")
def data_prepare(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl, heldout.jsonl and report.json.")],
    heldout_fraction: HeldoutFraction = 0.15,
    seed: Seed = 0,
) -> None:
    """Validate, clean and split a file."""
    from finetune.data.prepare import prepare

    with _one_line_errors():
        report = prepare(source, out, heldout_fraction=heldout_fraction, seed=seed)
    _show(report.to_table())


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
    # Threads that wait for each other by spinning lose most of their time once anything else runs: with one
    # busy neighbour on two cores a training step took 25 s, and 4 s with this. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Bases are local; a look at a hub would only cost time, or fail.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from finetune.job import load_job

    with _one_line_errors():
        result = _run_with_progress(load_job(job_file), home, force)
    if result.report:
        _show(result.report.to_table())
    _show(_card_table(result.card))
    for phase, seconds in result.phase_s.items():
        typer.echo(f"{phase:<9} {seconds:6.1f} s")
    typer.echo(f"{'reused, published before' if result.reused else 'published'}: {result.directory}")


@finetune_app.command("show")
def finetune_show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A published version.")],
) -> None:
    """Verify a published adapter against its card, and show the card."""
    from finetune.card import verify

    with _one_line_errors():
        card = verify(directory)
    _show(_card_table(card))


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


def _card_table(card: AdapterCard) -> Table:
    from rich.table import Table

    metrics = card.metrics
    low, high = metrics.difference_ci95
    table = Table(title=f"{card.tenant}/{card.adapter}@{card.version}", show_header=False)
    for name, value in (
        ("base", f"{card.base} ({card.base_sha256[:12]}…)"),
        ("adapter", f"rank {card.rank} on {', '.join(card.target_modules)}"),
        ("data", f"{card.data.train_rows} rows trained on, {card.data.heldout_rows} held out"),
        ("dropped", ", ".join(f"{count} {why}" for why, count in card.data.dropped.items()) or "none"),
        ("held-out NLL", f"{metrics.base_nll:.4f} base, {metrics.adapter_nll:.4f} adapter (nats a token)"),
        ("difference", f"{metrics.difference:+.4f}, 95% interval [{low:+.4f}, {high:+.4f}]"),
        ("perplexity", f"{metrics.base_perplexity:.2f} base, {metrics.adapter_perplexity:.2f} adapter"),
        ("gate", f"{'passed' if card.gate.passed else 'FAILED'}: {card.gate.rule}"),
        ("made", f"{card.created_at:%Y-%m-%d %H:%M:%S %Z}, seed {card.seed}"),
        ("with", ", ".join(f"{name} {version}" for name, version in card.libraries)),
    ):
        table.add_row(name, value)
    return table


def _show(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what went wrong on purpose into one line on stderr and exit status 1."""
    try:
        yield
    except FinetuneError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
