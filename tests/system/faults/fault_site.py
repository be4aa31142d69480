"""The application under fault: kills its processes, reads its ledger, notes what clients got."""

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import sqlalchemy as sa

from serve.billing.budgets.budgets import budgets_table, spend_table
from serve.billing.ledger.accounts import FINAL_PHASE, HOLD_PHASE, transfers_table
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.verification import verify
from serve.billing.metering.events import usage_table
from serve.billing.metering.queries import UsageQueries
from serve.billing.metering.reconciliation import Reconciliation, reconcile
from serve.commands.usage import engine_counts
from serve.errors import OperatorError
from tests.support.constants import TINY
from tests.support.live_service import LiveService
from tests.support.postgres import Postgres
from tests.support.streamed_request import StreamedRequest
from tests.support.waiting import wait_until
from tests.system.faults.fail_points import (
    AFTER_SETTLE,
    BEFORE_DISPATCH,
    BEFORE_FIRST_TOKEN,
    BEFORE_SETTLE,
    DURING_SETTLE,
    IN_MID_STREAM,
    STOP,
    FailPoints,
    Hit,
)

# The last stands still in a transaction, and with it all requests of the same tenant that need the ledger.
STOP_ORDER = (
    BEFORE_DISPATCH,
    BEFORE_FIRST_TOKEN,
    BEFORE_SETTLE,
    AFTER_SETTLE,
    IN_MID_STREAM,
    DURING_SETTLE,
)
TOKENS = 150
GATEWAYS = 3
ENGINE = f"engine-{TINY}"
CLOSED_S_MAX = 30.0  # by then no request is open any more, if its engine lives
REPLACED_S_MAX = 240.0  # an engine needs a minute or two to start


def chat_body(marker: str, tokens: int = TOKENS) -> dict[str, Any]:
    """A request whose fail points are set under `marker`."""
    messages = [{"role": "user", "content": marker}]
    return {"model": TINY, "messages": messages, "max_tokens": tokens, "temperature": 0}


def since(start_s: float) -> float:
    return time.monotonic() - start_s


def outcome(request: StreamedRequest) -> str:
    """How a request ended for its client, in the words of docs/faults.md."""
    code = request.error_code
    if request.finish_reason is not None:
        return "the whole answer"
    if request.status == 200:
        return f"an error event ({code})" if code else "a stream that is cut off"
    if request.status is None:
        return f"no answer ({request.transport_error})"
    return f"{request.status} ({code})" if code else f"{request.status}"


@dataclass(frozen=True)
class Observation:
    """A cell of the matrix: what a client got, and what the ledger holds."""

    fault: str
    moment: str
    client: str
    sent_tokens: int
    billed_tokens: int
    ledger: str
    closed_s: float
    counted: bool = True  # whether it is of one request, whose tokens were counted


@dataclass(frozen=True)
class StoppedRequest:
    """A request that stands still at a fail point until it is resumed."""

    request: StreamedRequest
    point: str
    marker: str
    hit: Hit


@dataclass(frozen=True)
class FaultSite(LiveService):
    postgres: Postgres
    fail_points: FailPoints
    observations: list[Observation]

    def stream(self, marker: str, tokens: int = TOKENS) -> StreamedRequest:
        return StreamedRequest(self, chat_body(marker, tokens))

    def stop_at(self, point: str, marker: str, tokens: int = TOKENS) -> StoppedRequest:
        self.fail_points.set(point, marker, STOP)
        request = self.stream(marker, tokens)
        return StoppedRequest(request, point, marker, self.wait_hit(point, marker))

    def resume(self, stopped: StoppedRequest) -> None:
        self.fail_points.release(stopped.point, stopped.marker)

    def wait_until_complete(self) -> None:
        """Returns when every replica is there and answers."""

        def complete() -> bool:
            counts = {"gateway": GATEWAYS, "steward": 1, ENGINE: 1}
            return (
                all(len(self.running_pids(name)) == count for name, count in counts.items()) and self._ready()
            )

        wait_until(complete, REPLACED_S_MAX, 0.1)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self, *deployments: str, also: int | None = None) -> None:
        """SIGKILL for the process `also`, and for all replicas of `deployments` and their children."""
        victims = [] if also is None else [psutil.Process(also)]
        for deployment in deployments:
            for pid in self.running_pids(deployment).values():
                replica = psutil.Process(pid)
                victims += [replica, *replica.children(recursive=True)]
        assert victims
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def wait_hit(self, point: str, marker: str) -> Hit:
        wait_until(lambda: self.fail_points.hit(point, marker) is not None, 60, 0.01)
        hit = self.fail_points.hit(point, marker)
        assert hit is not None
        return hit

    def closing(self, request_id: str) -> dict[str, Any] | None:
        """The one transfer that closes a request."""
        c = transfers_table.c
        query = sa.select(transfers_table).where(c.request_id == request_id, c.phase == FINAL_PHASE)
        with self.store.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return dict(row) if row else None

    def event(self, request_id: str) -> dict[str, Any] | None:
        query = sa.select(usage_table).where(usage_table.c.request_id == request_id)
        with self.store.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return dict(row) if row else None

    def wait_closed(self, request_id: str, timeout_s: float = CLOSED_S_MAX) -> None:
        wait_until(lambda: self.closing(request_id) is not None, timeout_s)

    def observe(
        self, fault: str, moment: str, request: StreamedRequest, request_id: str, closed_s: float
    ) -> Observation:
        closing, event = self.closing(request_id), self.event(request_id)
        assert closing is not None
        ledger = f"settled, {event['status']}" if event else f"void, {closing['reason']}"
        billed = event["completion_tokens"] if event else 0
        observation = Observation(
            fault, moment, outcome(request), request.tokens, billed, ledger, round(closed_s, 1)
        )
        self.observations.append(observation)
        return observation

    def note(self, fault: str, moment: str, client: str, ledger: str, seconds: float = 0.0) -> None:
        """Adds an observation that is not of one request."""
        self.observations.append(
            Observation(fault, moment, client, 0, 0, ledger, round(seconds, 1), counted=False)
        )

    def check(self) -> None:
        """Asserts what must hold after every fault, once it is over; waits for it within bounds."""
        wait_until(lambda: not Ledger(self.store).open_holds(), CLOSED_S_MAX)
        t, e = transfers_table.c, usage_table.c
        with self.store.read() as connection:
            opened = set(connection.execute(sa.select(t.request_id).where(t.phase == HOLD_PHASE)).scalars())
            closing = sa.select(t.request_id).where(t.phase == FINAL_PHASE, t.kind.in_(("settle", "void")))
            closed = list(connection.execute(closing).scalars())
            settled = sa.select(sa.func.coalesce(sa.func.sum(t.amount_nanos), 0)).where(t.kind == "settle")
            billed = sa.select(sa.func.coalesce(sa.func.sum(e.cost_nanos), 0))
            sums = [int(connection.execute(query).scalar_one()) for query in (settled, billed)]
            spent, limits = spend_table.c, budgets_table.c
            overshot = sa.select(spent.budget_id).join(budgets_table, limits.id == spent.budget_id)
            overshot = overshot.where(limits.hard, spent.spent_nanos + spent.held_nanos > limits.limit_nanos)
            assert connection.execute(overshot).all() == []
        assert sorted(closed) == sorted(opened), "each request has exactly one closing transfer"
        accounts = [Ledger(self.store).account(tenant) for tenant in self.keys]
        assert [account.held_nanos for account in accounts] == [0] * len(accounts)
        assert sums == [sum(account.spent_nanos for account in accounts)] * 2
        assert [check for check in verify(self.store) if check.mismatches] == []
        drifts = [(engine.prompt_drift, engine.completion_drift) for engine in self.drift()]
        assert drifts == [(0, 0)]

    def drift(self) -> list[Reconciliation]:
        """Computes the drift as `bespoke usage check` does. A gateway that has just died is asked again."""
        entries: list[Reconciliation] = []

        def answered() -> bool:
            try:
                entries[:] = reconcile(engine_counts(self.url), UsageQueries(self.store).by_engine())
            except OperatorError:
                return False
            return bool(entries)

        wait_until(answered, REPLACED_S_MAX, 0.2)
        return entries
