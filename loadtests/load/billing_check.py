"""Checks the bill after a run: reads usage API, /metrics and, if it can, the ledger, and compares them."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import httpx
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from loadtests.load.bill_comparison import (
    NOTHING,
    Bill,
    BillMismatch,
    TokenCounts,
    Verdict,
    by_engine,
    by_model,
    by_request,
    engines_at_least,
    engines_counted,
)
from loadtests.load.request_record import RequestRecord
from loadtests.load.service_under_test import ServiceUnderTest
from serve.billing.ledger.ledger import Ledger
from serve.billing.metering.events import usage_table
from serve.billing.metering.queries import UsageQueries
from serve.billing.metering.reconciliation import EngineCount, reconcile
from serve.commands.usage import engine_counts
from serve.errors import OperatorError
from serve.storage.database import Store

SETTLED_TIMEOUT_S = 30.0
QUIET_TIMEOUT_S = 20.0  # the steward compares every five seconds

UsageByModel = dict[tuple[str, str], TokenCounts]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Holds the counts when the run began. `since` is the Unix time from which usage is read."""

    since: int
    used: UsageByModel
    engines: list[EngineCount] | None
    last_event: int


class BillingCheck:
    """Compares the bill of one service with what clients and engines counted. Blocks (on Locust's gevent)."""

    def __init__(self, service: ServiceUnderTest) -> None:
        self._service = service
        self._tenants = sorted(service.billing_keys)

    def begin(self) -> Baseline:
        """Reads the counts before the first request."""
        self._wait_settled()
        since, last_event = int(time.time()), 0
        if self._service.store_url is not None:
            with closing(Store(self._service.store_url)) as store, store.read() as connection:
                last_event = connection.execute(sa.select(sa.func.max(usage_table.c.id))).scalar_one() or 0
        return Baseline(since, self._used(since), self._engines(), last_event)

    def finish(self, baseline: Baseline, records: list[RequestRecord]) -> Verdict:
        """Waits until every request is settled, then compares all that can be compared."""
        verdict = Verdict()
        if not self._wait_settled():
            text = f"some are, after {SETTLED_TIMEOUT_S:g} s"
            verdict.mismatches.append(BillMismatch("our tenants", "requests still open", "none", text))
        used = {
            model: counts - baseline.used.get(model, NOTHING)
            for model, counts in self._used(baseline.since).items()
            if counts != baseline.used.get(model, NOTHING)
        }
        verdict.add("clients = usage API, by tenant and model", len(used), by_model(records, used))
        engines = self._engines()
        if self._service.store_url is not None:
            with closing(Store(self._service.store_url)) as store:
                bills = self._bills(store, baseline.last_event)
                verdict.add("clients = ledger, by request", len(records), by_request(records, bills))
                entries = reconcile(engines or [], UsageQueries(store).by_engine())
                verdict.add("ledger = engines, by process", len(entries), by_engine(entries))
        elif engines is not None and baseline.engines is not None:
            counted, total = engines_counted(baseline.engines, engines), sum(used.values(), NOTHING)
            ended = {(e.replica, e.boot) for e in baseline.engines} - {(e.replica, e.boot) for e in engines}
            if ended:
                verdict.notes.append(f"{len(ended)} engine processes ended: what they counted is not known.")
            else:
                verdict.add("usage API ≤ engines", len(engines), engines_at_least(counted, total))
                others = counted.completion - total.completion
                if others > 0:
                    verdict.notes.append(f"The engines also generated {others} tokens for others.")
            self._add_steward_comparison(verdict)
        if not engines:
            text = "/metrics names none, or wants BESPOKE_METRICS_TOKEN"
            verdict.mismatches.append(BillMismatch("engines", "their counters", "to be read", text))
        return verdict

    def _add_steward_comparison(self, verdict: Verdict) -> None:
        """Waits for the steward, which compares the whole ledger with the engines when no request runs."""
        ended_s = time.time()
        drifts: list[BillMismatch] = []

        def compared() -> bool:
            drifts.clear()
            at = 0.0
            for family in text_string_to_metric_families(self._metrics()):
                for sample in family.samples:
                    if family.name == "bespoke_ledger_drift_timestamp_seconds":
                        at = sample.value
                    elif family.name == "bespoke_ledger_drift_tokens" and sample.value:
                        subject = f"engine {sample.labels['base']} {sample.labels['boot'][:8]}"
                        quantity = f"{sample.labels['class']} tokens not billed"
                        drifts.append(BillMismatch(subject, quantity, "0", f"{sample.value:g}"))
            return at > ended_s

        if _until(compared, QUIET_TIMEOUT_S):
            verdict.add("ledger = engines, says the steward", 1, drifts)
        else:
            verdict.notes.append("The service was never quiet: the steward has not compared it since.")

    def _engines(self) -> list[EngineCount] | None:
        try:
            return engine_counts(self._service.url, self._service.metrics_token)
        except OperatorError:
            return None

    def _metrics(self) -> str:
        token = self._service.metrics_token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.get(f"{self._service.url}/metrics", headers=headers, timeout=30).raise_for_status().text

    def _wait_settled(self) -> bool:
        """Tells whether our tenants have no open holds, within SETTLED_TIMEOUT_S."""
        if self._service.store_url is not None:
            with closing(Store(self._service.store_url)) as store:
                ledger = Ledger(store)
                return _until(lambda: not ledger.open_holds(), SETTLED_TIMEOUT_S)
        return _until(
            lambda: all(
                not self._get(tenant, "/v1/organization/balance")["held_nanos"] for tenant in self._tenants
            ),
            SETTLED_TIMEOUT_S,
        )

    def _used(self, since: int) -> UsageByModel:
        used: UsageByModel = defaultdict(TokenCounts)
        for tenant in self._tenants:
            for result in self._results(tenant, since):
                counts = TokenCounts(
                    result["num_model_requests"],
                    result["input_tokens"],
                    result["input_cached_tokens"],
                    result["output_tokens"],
                )
                used[tenant, result["model"]] += counts
        return dict(used)

    def _results(self, tenant: str, since: int) -> Iterable[dict[str, Any]]:
        params: dict[str, Any] = {"start_time": since, "bucket_width": "1d", "limit": 31, "group_by": "model"}
        while True:
            page = self._get(tenant, "/v1/organization/usage/completions", params)
            for bucket in page["data"]:
                yield from bucket["results"]
            if not page["has_more"]:
                return
            params["page"] = page["next_page"]

    def _get(self, tenant: str, path: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._service.billing_keys[tenant]}"}
        response = httpx.get(f"{self._service.url}{path}", headers=headers, params=params, timeout=30)
        body: dict[str, Any] = response.raise_for_status().json()
        return body

    def _bills(self, store: Store, after: int) -> dict[str, Bill]:
        c = usage_table.c
        columns = (c.request_id, c.tenant_id, c.model, c.prompt_tokens, c.cached_tokens, c.completion_tokens)
        query = sa.select(*columns).where(c.id > after, c.tenant_id.in_(self._tenants))
        with store.read() as connection:
            return {
                request_id: Bill(tenant, model, TokenCounts(1, *counts))
                for request_id, tenant, model, *counts in connection.execute(query)
            }


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True
