"""`bespoke usage`: who used what; and whether the ledger agrees with the engines."""

from typing import Annotated

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from serve.billing.invoice import period_bounds
from serve.billing.ledger import Ledger
from serve.billing.money import usd
from serve.billing.reconcile import EngineCount, Reconciliation, reconcile
from serve.billing.reports import Usage
from serve.commands.parts import HomeOption, console, open_store, settings_of, table
from serve.errors import OperatorError, ReconciliationFailed

app = typer.Typer(no_args_is_help=True)


@app.command()
def show(
    tenant: Annotated[str | None, typer.Argument()] = None,
    month: Annotated[str | None, typer.Option(help="As 2026-11; default: all time.")] = None,
    home: HomeOption = None,
) -> None:
    """Requests, tokens and cost per tenant and model."""
    start, end = period_bounds(month) if month else (None, None)
    totals = Usage(open_store(settings_of(home))).totals(tenant=tenant, start=start, end=end)
    rows = table("tenant", "model", ">requests", ">prompt", ">of it cached", ">completion", ">cost USD")
    for total in totals:
        counts = (total.requests, total.tokens.prompt, total.tokens.cached, total.tokens.completion)
        rows.add_row(total.tenant, total.label, *(f"{count:,}" for count in counts), usd(total.cost_nanos))
    console.print(rows)


@app.command()
def check(
    url: Annotated[str, typer.Option(help="The running gateway.")] = "http://127.0.0.1:8000",
    home: HomeOption = None,
) -> None:
    """Compare the ledger's totals with each engine's own counters; exit 1 if they differ."""
    settings = settings_of(home)
    store = open_store(settings)
    token = settings.metrics_token.get_secret_value() if settings.metrics_token else None
    entries = reconcile(engine_counts(url, token), Usage(store).by_engine())
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
