"""`bespoke usage`: usage and its forecast; checks of the ledger against itself and the engines."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families

from serve.billing.invoicing.periods import period_bounds
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.verification import verify
from serve.billing.metering.events import label_of
from serve.billing.metering.forecast import forecast
from serve.billing.metering.queries import ALL_TIME, DAY, UsageQueries, UsageQuery
from serve.billing.metering.reconciliation import EngineCount, Reconciliation, reconcile
from serve.billing.metering.rollups import rebuild
from serve.billing.money import exact, rounded
from serve.commands.common import (
    HomeOption,
    JsonOption,
    ProfileOption,
    console,
    gateway_url,
    now,
    open_store,
    print_json,
    settings_of,
)
from serve.commands.tables import Table
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
    month: Annotated[str | None, typer.Option(help="Such as 2026-11; default: all time.")] = None,
    by: Annotated[By, typer.Option(help="The further dimension of the rows.")] = By.MODEL,
    key: Annotated[str | None, typer.Option(help="Only the usage of this key, by its id.")] = None,
    project: Annotated[str | None, typer.Option(help="Only the usage of this project, by its id.")] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show requests, tokens and cost per tenant and model."""
    start, end = period_bounds(month) if month else ALL_TIME
    query = UsageQuery(
        start,
        end,
        DAY if by == By.DAY else None,
        tenants=(tenant,) if tenant else (),
        keys=(key,) if key else (),
        projects=(project,) if project else (),
        by=frozenset({"tenant", "model", "tier", "currency", by.value}),
    )
    usage = UsageQueries(open_store(settings_of(home))).query(query)
    if as_json:
        from serve.commands.wire import usage_page

        return print_json(usage_page(usage, (start, end), by_day=by == By.DAY))
    between = () if by == By.MODEL else (by.value,)
    columns = (">requests", ">prompt", ">of it cached", ">completion", ">cost", "currency")
    rows = Table("tenant", *between, "model", *columns)
    for bucket in usage:
        groups = {
            By.MODEL: (),
            By.DAY: (f"{bucket.bucket:%Y-%m-%d}",),
            By.KEY: (bucket.key or "",),
            By.PROJECT: (bucket.project or "-",),
        }
        t, label = bucket.tokens, label_of(bucket.model or "", bucket.tier or "")
        counts = (bucket.requests, t.prompt, t.cached, t.completion)
        rows.add_row(
            bucket.tenant or "",
            *groups[by],
            label,
            *(f"{count:,}" for count in counts),
            exact(bucket.cost_nanos, bucket.currency or ""),
            bucket.currency or "",
        )
    console.print(rows)


@app.command(name="forecast")
def forecast_month(
    tenant: Annotated[str | None, typer.Argument()] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Project the cost of this month at its end, at list price."""
    result = forecast(open_store(settings_of(home)), tenant=tenant, at=now())
    if as_json:
        from serve.api.organization.forecast import forecast_wire

        return print_json(forecast_wire(result, tenant))
    rows = Table(
        "line item",
        ">to date",
        ">at month's end",
        ">lowest",
        ">highest",
        "currency",
        title=f"{result.month:%Y-%m}",
    )
    for item in (*result.line_items, *result.totals):
        amounts = (item.to_date_nanos, item.projected_nanos, item.low_nanos, item.high_nanos)
        row_amounts = (rounded(nanos, item.currency) for nanos in amounts)
        rows.add_row(item.line_item or "total", *row_amounts, item.currency)
    console.print(rows)
    console.print(f"month to date + mean of the last {result.basis_days} full days (UTC) x days left")


@app.command(name="verify")
def verify_ledger(home: HomeOption = None) -> None:
    """Compute every balance and sum again from the append-only rows; exit 1 if any differs."""
    checks = verify(open_store(settings_of(home)))
    rows = Table("check", ">compared", ">different")
    mismatches = Table("check", "subject", ">stored", ">expected")
    for check in checks:
        rows.add_row(check.name, f"{check.compared:,}", f"{len(check.mismatches):,}")
        for mismatch in check.mismatches:
            amounts = (f"{mismatch.stored:,}", f"{mismatch.expected:,}")
            mismatches.add_row(check.name, mismatch.subject, *amounts)
    console.print(rows)
    if mismatches.row_count:
        console.print(mismatches)
        raise ReconciliationFailed("The ledger does not agree with itself.")
    console.print("the ledger agrees with itself to the nano", style="green")


@app.command(name="rebuild")
def rebuild_hours(
    day: Annotated[datetime, typer.Argument(formats=["%Y-%m-%d"], help="In UTC.")], home: HomeOption = None
) -> None:
    """Rebuild the hourly sums of a day from its events."""
    different = rebuild(open_store(settings_of(home)), day.date(), actor=command_actor(), at=now())
    console.print(f"{day:%Y-%m-%d}: {different} rows differed")


@app.command()
def check(
    url: Annotated[
        str | None, typer.Option(help="The running gateway; default: the host and port of the settings.")
    ] = None,
    config: ProfileOption = None,
    home: HomeOption = None,
) -> None:
    """Compare the ledger's totals with each engine's own counters; exit 1 if they differ."""
    settings = settings_of(home, config)
    store = open_store(settings)
    token = settings.metrics_token.get_secret_value() if settings.metrics_token else None
    entries = reconcile(engine_counts(url or gateway_url(settings), token), UsageQueries(store).by_engine())
    rows = Table("engine", "class", ">vLLM counted", ">checks", ">billed", ">drift")
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

    Raises OperatorError if the gateway does not answer, or wants another metrics token.
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
                engine = (sample.labels["base"], sample.labels["replica"], sample.labels["boot"])
                prefix = "probe_" if family.name == "bespoke_probe_tokens" else ""
                counts.setdefault(engine, {})[f"{prefix}{sample.labels['class']}_tokens"] = int(sample.value)
    return [EngineCount(*engine, **values) for engine, values in sorted(counts.items())]  # type: ignore[arg-type]


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
