"""`bespoke usage`: who used what; whether the ledger agrees with itself, and with the engines."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from serve.billing.invoicing.periods import period_bounds
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.verification import verify
from serve.billing.metering.events import label_of
from serve.billing.metering.forecast import forecast
from serve.billing.metering.queries import ALL_TIME, DAY, UsageQueries, UsageQuery
from serve.billing.metering.reconciliation import EngineCount, Reconciliation, reconcile
from serve.billing.metering.rollups import rebuild
from serve.billing.money import cents, usd
from serve.commands.common import HomeOption, console, now, open_store, settings_of, table
from serve.errors import OperatorError, ReconciliationFailed
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)


class By(StrEnum):
    MODEL = "model"
    DAY = "day"
    KEY = "key"
    PROJECT = "project"


@app.command()
def show(
    tenant: Annotated[str | None, typer.Argument()] = None,
    month: Annotated[str | None, typer.Option(help="As 2026-11; default: all time.")] = None,
    by: Annotated[By, typer.Option(help="What else to tell apart.")] = By.MODEL,
    key: Annotated[str | None, typer.Option(help="Only this key's, by its id.")] = None,
    project: Annotated[str | None, typer.Option(help="Only this project's, by its id.")] = None,
    home: HomeOption = None,
) -> None:
    """Requests, tokens and cost per tenant and model."""
    start, end = period_bounds(month) if month else ALL_TIME
    question = UsageQuery(
        start,
        end,
        DAY if by == By.DAY else None,
        tenants=(tenant,) if tenant else (),
        keys=(key,) if key else (),
        projects=(project,) if project else (),
        by=frozenset({"tenant", "model", "tier", by.value}),
    )
    between = () if by == By.MODEL else (f"!{by.value}",)
    columns = (">requests", ">prompt", ">of it cached", ">completion", ">cost USD")
    rows = table("tenant", *between, "model", *columns)
    for used in UsageQueries(open_store(settings_of(home))).query(question):
        groups = {
            By.MODEL: (),
            By.DAY: (f"{used.bucket:%Y-%m-%d}",),
            By.KEY: (used.key,),
            By.PROJECT: (used.project or "-",),
        }
        t, label = used.tokens, label_of(used.model or "", used.tier or "")
        counts = (used.requests, t.prompt, t.cached, t.completion)
        rows.add_row(
            used.tenant, *groups[by], label, *(f"{count:,}" for count in counts), usd(used.cost_nanos)
        )
    console.print(rows)


@app.command(name="forecast")
def forecast_month(tenant: Annotated[str | None, typer.Argument()] = None, home: HomeOption = None) -> None:
    """What this month will have cost at its end, at list price."""
    made = forecast(open_store(settings_of(home)), tenant=tenant, at=now())
    rows = table(
        "what", ">to date USD", ">at month's end", ">lowest", ">highest", title=f"{made.month:%Y-%m}"
    )
    for one in (*made.line_items, made.total):
        amounts = (one.to_date_nanos, one.projected_nanos, one.low_nanos, one.high_nanos)
        rows.add_row(one.line_item or "total", *(cents(nanos) for nanos in amounts))
    console.print(rows)
    console.print(f"month to date + mean of the last {made.basis_days} full days (UTC) x days left")


@app.command(name="verify")
def verify_ledger(home: HomeOption = None) -> None:
    """Make every balance and sum again from the rows that are only ever added; exit 1 if any differs."""
    checks = verify(open_store(settings_of(home)))
    rows = table("check", ">compared", ">different")
    wrong = table("check", "!what", ">kept", ">said")
    for one in checks:
        rows.add_row(one.name, f"{one.compared:,}", f"{len(one.mismatches):,}")
        for different in one.mismatches:
            wrong.add_row(one.name, different.subject, f"{different.stored:,}", f"{different.expected:,}")
    console.print(rows)
    if wrong.row_count:
        console.print(wrong)
        raise ReconciliationFailed("The ledger does not agree with itself.")
    console.print("the ledger agrees with itself to the nano", style="green")


@app.command(name="rebuild")
def rebuild_hours(
    day: Annotated[datetime, typer.Argument(formats=["%Y-%m-%d"], help="In UTC.")], home: HomeOption = None
) -> None:
    """Make the hours of a day anew from its events."""
    wrong = rebuild(open_store(settings_of(home)), day.date(), actor=command_actor(), at=now())
    console.print(f"{day:%Y-%m-%d}: {wrong} rows differed")


@app.command()
def check(
    url: Annotated[str, typer.Option(help="The running gateway.")] = "http://127.0.0.1:8000",
    home: HomeOption = None,
) -> None:
    """Compare the ledger's totals with each engine's own counters; exit 1 if they differ."""
    settings = settings_of(home)
    store = open_store(settings)
    token = settings.metrics_token.get_secret_value() if settings.metrics_token else None
    entries = reconcile(engine_counts(url, token), UsageQueries(store).by_engine())
    rows = table("engine", "class", ">vLLM counted", ">checks", ">billed", ">drift")
    for entry in entries:
        _add_rows(rows, entry)
    console.print(rows)
    if open_holds := Ledger(store).open_holds():
        raise ReconciliationFailed(
            f"{len(open_holds)} requests are still open; try again when they have ended."
        )
    if not entries or not all(entry.agrees for entry in entries):
        raise ReconciliationFailed("The ledger and the engines disagree.")
    console.print("ledger and engines agree to the token", style="green")


def engine_counts(url: str, token: str | None = None) -> list[EngineCount]:
    """The live engines' counters from the gateway's /metrics.

    Raises OperatorError if the gateway is away, or wants another metrics token.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        response = httpx.get(f"{url}/metrics", headers=headers, timeout=30)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise OperatorError(f"The gateway at {url} wants its metrics token: set BESPOKE_METRICS_TOKEN.")
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise OperatorError(f"No gateway answers at {url}: {error}") from error
    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    for family in text_string_to_metric_families(response.text):
        if family.name in ("bespoke_vllm_tokens", "bespoke_probe_tokens"):
            for sample in family.samples:
                who = (sample.labels["base"], sample.labels["replica"], sample.labels["boot"])
                prefix = "probe_" if family.name == "bespoke_probe_tokens" else ""
                counts.setdefault(who, {})[f"{prefix}{sample.labels['class']}_tokens"] = int(sample.value)
    return [EngineCount(*who, **values) for who, values in sorted(counts.items())]  # type: ignore[arg-type]


def _add_rows(rows: Table, entry: Reconciliation) -> None:
    engine = entry.engine
    name = f"{engine.base} {engine.boot[:8]}"
    prompt = (
        engine.prompt_tokens,
        engine.probe_prompt_tokens,
        entry.billed_prompt_tokens,
        entry.prompt_drift,
    )
    completion = (
        engine.completion_tokens,
        engine.probe_completion_tokens,
        entry.billed_completion_tokens,
        entry.completion_drift,
    )
    rows.add_row(name, "prompt", *(f"{count:,}" for count in prompt))
    rows.add_row(name, "completion", *(f"{count:,}" for count in completion))
