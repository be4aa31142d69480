"""Counts what one gateway process does.

Labels are bases, routes, status codes and, within limits, adapters. The number of adapters has no bound and
their names are customers' own. So only the first `adapters_max` that a process sees get a label and the rest
are `other`. The composition root allows none unless only the operator can read the metrics.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from time import monotonic

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from serve.billing.pricing.plans import Tokens
from serve.errors import BespokeError, BudgetExceeded, InsufficientCredit, RateLimited
from serve.observability.metrics.aggregate import Exposition, labelled
from serve.observability.metrics.token_latency import BUCKETS_S, TokenLatency, TokenLatencyHistogram

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series per series, which no dashboard of ours reads

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ADAPTER_TTFT_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 10.0)  # each is a series per adapter
_ADAPTER_TOKEN_LATENCY_BUCKETS_S = (0.01, 0.03, 0.1, 0.25, 1.0)
_REQUEST_BUCKETS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SETTLEMENT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
_COMMIT_ENTRIES_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CODES_MAX = 64  # our own error codes are fewer; a label that is taken from an error must have a bound
ALONE = "alone"


class Metrics:
    """Holds one gateway's metrics, in a registry of their own.

    `adapters_max` is how many adapters get a label of their own. A reader must present `token`. `gateway` is
    the label that distinguishes this gateway's series.
    """

    def __init__(self, *, adapters_max: int = 0, token: str | None = None, gateway: str = ALONE) -> None:
        self.token = token
        self.gateway = gateway
        self._adapters_max = adapters_max
        self._adapters: set[str] = set()
        self._codes: set[str] = set()
        self._unsettled_since_s: dict[int, float] = {}
        self._numbers = itertools.count()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._add_http_metrics()
        self._add_generation_metrics()
        self._add_ledger_metrics()
        self._add_adapter_metrics()

    def _add_http_metrics(self) -> None:
        build = Info("bespoke_build", "What runs.", registry=self.registry)
        build.info({"version": _version(), "python": python_version()})
        self._requests = Counter(
            "bespoke_requests", "HTTP requests.", ["route", "code"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "bespoke_request_duration_seconds",
            "From a request's arrival to the last byte of its answer.",
            ["route"],
            buckets=_REQUEST_BUCKETS_S,
            registry=self.registry,
        )
        self._errors = Counter(
            "bespoke_errors",
            "Requests that were answered with an error, or broke off with one, by OpenAI's type and code.",
            ["type", "code"],
            registry=self.registry,
        )
        self._broken = Counter(
            "bespoke_streams_broken",
            "Streams that ended in an error after their status, a 200, was sent.",
            ["route"],
            registry=self.registry,
        )
        self._limited = Counter(
            "bespoke_limit_rejections",
            "Requests that a limit refused: requests, tokens, concurrent, credit or budget.",
            ["kind"],
            registry=self.registry,
        )

    def _add_generation_metrics(self) -> None:
        self.in_progress = Gauge(
            "bespoke_requests_in_progress", "Admitted requests not yet closed.", registry=self.registry
        )
        self.waiting = Gauge(
            "bespoke_requests_waiting",
            "Admitted requests that no engine has accepted yet.",
            registry=self.registry,
        )
        self._closed = Counter(
            "bespoke_requests_closed", "Admitted requests by outcome.", ["status"], registry=self.registry
        )
        self._retried = Counter(
            "bespoke_requests_retried",
            "Requests dispatched again because their replica died before the first token.",
            registry=self.registry,
        )
        self._quarantined = Counter(
            "bespoke_requests_quarantined",
            "Requests with which a replica died, and which are refused for 10 minutes.",
            registry=self.registry,
        )
        self._quarantine_refusals = Counter(
            "bespoke_quarantine_refusals",
            "Requests that were refused because a replica had died with the same.",
            registry=self.registry,
        )
        self._tokens = Counter(
            "bespoke_tokens", "Billed tokens by class.", ["base", "class"], registry=self.registry
        )
        self._billed = Counter(
            "bespoke_billed_amount",
            "List price of what was settled: the ledger has it to the nano.",
            ["base", "currency"],
            registry=self.registry,
        )
        self._ttft = Histogram(
            "bespoke_time_to_first_token_seconds",
            "From admission to the first token.",
            ["base"],
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._token_latency = TokenLatencyHistogram(
            "bespoke_inter_token_latency_seconds",
            "Between tokens of a choice, once the request has ended.",
            ["base"],
            BUCKETS_S,
        )
        self.registry.register(self._token_latency)

    def _add_ledger_metrics(self) -> None:
        self._checkpoint_failures = Counter(
            "bespoke_checkpoint_failures",
            "Writes of checkpoints that failed: its counts are safe only while it lives.",
            registry=self.registry,
        )
        self._settlement = Histogram(
            "bespoke_settlement_seconds",
            "From a request's end until it is settled or voided in the store.",
            buckets=_SETTLEMENT_BUCKETS_S,
            registry=self.registry,
        )
        unsettled = Gauge(
            "bespoke_unsettled_requests",
            "Ended requests that are neither settled nor voided yet.",
            registry=self.registry,
        )
        unsettled.set_function(lambda: len(self._unsettled_since_s))
        oldest = Gauge(
            "bespoke_oldest_unsettled_seconds",
            "How long ago the first of them has ended.",
            registry=self.registry,
        )
        oldest.set_function(self._oldest_unsettled_s)
        self._commits = Histogram(
            "bespoke_commit_seconds",
            "The ledger's transactions.",
            buckets=_SETTLEMENT_BUCKETS_S,
            registry=self.registry,
        )
        self._commit_entries = Histogram(
            "bespoke_commit_entries",
            "Holds and settlements in one of them.",
            buckets=_COMMIT_ENTRIES_BUCKETS,
            registry=self.registry,
        )

    def _add_adapter_metrics(self) -> None:
        self._adapter_requests = Counter(
            "bespoke_adapter_requests",
            "Admitted requests by adapter and outcome.",
            ["base", "adapter", "status"],
            registry=self.registry,
        )
        self._adapter_tokens = Counter(
            "bespoke_adapter_tokens",
            "Billed tokens by adapter and class.",
            ["base", "adapter", "class"],
            registry=self.registry,
        )
        self._adapter_ttft = Histogram(
            "bespoke_adapter_time_to_first_token_seconds",
            "From admission to the first token, by adapter.",
            ["base", "adapter"],
            buckets=_ADAPTER_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._adapter_token_latency = TokenLatencyHistogram(
            "bespoke_adapter_inter_token_latency_seconds",
            "Between tokens of a choice, once the request has ended, by adapter.",
            ["base", "adapter"],
            _ADAPTER_TOKEN_LATENCY_BUCKETS_S,
        )
        self.registry.register(self._adapter_token_latency)

    def exposition(self) -> Exposition:
        """Renders all metrics in Prometheus' text format, with this gateway's name.

        With many adapters this takes tens of ms, so event loops leave it to a thread.
        """
        return Exposition(self.gateway, labelled(generate_latest(self.registry), self.gateway))

    def checkpoint_failed(self) -> None:
        self._checkpoint_failures.inc()

    def committed(self, entries: int, seconds: float) -> None:
        """Notes a transaction of the ledger with `entries` holds and settlements. Any thread may call it."""
        self._commits.observe(seconds)
        self._commit_entries.observe(entries)

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Measures the time from a request's end until it is closed in the store."""
        number, ended_s = next(self._numbers), monotonic()
        self._unsettled_since_s[number] = ended_s
        try:
            yield
        finally:
            del self._unsettled_since_s[number]
            self._settlement.observe(monotonic() - ended_s)

    def _oldest_unsettled_s(self) -> float:
        ended_s = list(self._unsettled_since_s.values())  # at once: this may be another thread
        return monotonic() - ended_s[0] if ended_s else 0.0

    def request(self, route: str, code: int, seconds: float) -> None:
        self._requests.labels(route, str(code)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def refused(self, error: BespokeError, kind: str, code: str) -> None:
        """Notes that a request was answered with `error`, which OpenAI calls `kind` and `code`."""
        self._note_error(kind, code)
        match error:
            case RateLimited():
                self._limited.labels(error.what.split()[0]).inc()
            case BudgetExceeded():
                self._limited.labels("budget").inc()
            case InsufficientCredit():
                self._limited.labels("credit").inc()

    def broken(self, route: str, kind: str, code: str) -> None:
        """Notes that an answer that had begun ended in an error, which OpenAI calls `kind` and `code`."""
        self._broken.labels(route).inc()
        self._note_error(kind, code)

    def _note_error(self, kind: str, code: str) -> None:
        if code not in self._codes and len(self._codes) >= _CODES_MAX:
            code = "other"
        self._codes.add(code)
        self._errors.labels(kind, code).inc()

    def closed(self, base: str, adapter: str | None, status: str) -> None:
        self._closed.labels(status).inc()
        self._adapter_requests.labels(base, self._label(adapter), status).inc()

    def retried(self) -> None:
        self._retried.inc()

    def quarantined(self) -> None:
        self._quarantined.inc()

    def quarantine_refused(self) -> None:
        self._quarantine_refusals.inc()

    def tokens(self, base: str, adapter: str | None, tokens: Tokens) -> None:
        label = self._label(adapter)
        classes = {
            "prompt": tokens.uncached,
            "cached_prompt": tokens.cached,
            "completion": tokens.completion,
        }
        for kind, count in classes.items():
            self._tokens.labels(base, kind).inc(count)
            self._adapter_tokens.labels(base, label, kind).inc(count)

    def billed(self, base: str, nanos: int, currency: str) -> None:
        self._billed.labels(base, currency).inc(nanos / 1e9)

    def ttft(self, base: str, adapter: str | None, seconds: float) -> None:
        self._ttft.labels(base).observe(seconds)
        self._adapter_ttft.labels(base, self._label(adapter)).observe(seconds)

    def token_latency(self, base: str, adapter: str | None, token_latency: TokenLatency) -> None:
        self._token_latency.add((base,), token_latency)
        self._adapter_token_latency.add((base, self._label(adapter)), token_latency)

    def _label(self, adapter: str | None) -> str:
        """Returns the label of `adapter`, a version's model name or None for the bare base."""
        if adapter is None:
            return "none"
        if adapter not in self._adapters and len(self._adapters) >= self._adapters_max:
            return "other"
        self._adapters.add(adapter)
        return adapter


def _version() -> str:
    try:
        return version("bespoke-llm")
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"
