"""One real application on a real PostgreSQL, whose processes tests kill; what was seen is noted."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from serve.billing.budgets.budgets import budgets_table, spend_table
from serve.billing.ledger.accounts import FINAL_PHASE, HOLD_PHASE, transfers_table
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.verification import verify
from serve.billing.metering.events import usage_table
from serve.billing.metering.queries import UsageQueries
from serve.billing.metering.reconciliation import Reconciliation, reconcile
from serve.commands.usage import engine_counts
from serve.errors import OperatorError
from serve.settings import EngineSettings, Settings
from serve.storage.database import Store
from tests.faults.failpoints import FailPoints, FaultyEngine, FaultyGateway, FaultySteward, Hit
from tests.serve.conftest import (
    TENANTS,
    TINY,
    Live,
    free_port,
    import_tiny,
    migrated_sqlite,
    new_database,
    onboard,
    shop,
    store,
    wait_until,
)
from tests.support.postgres import Postgres
from tests.support.serve_details import live_replicas

__all__ = ["migrated_sqlite", "new_database", "shop", "store"]  # for the tests of the store alone

TENANT = TENANTS[0]
TOKENS = 150
GATEWAYS = 3
ENGINE = f"engine-{TINY}"
CLOSED_S_MAX = 30.0  # by then nothing is open any more, if its engine lives
REPLACED_S_MAX = 240.0  # an engine needs a minute or two to start
OBSERVATIONS = "BESPOKE_FAULTS_JSON"  # where to write what was seen


def body(marker: str, tokens: int = TOKENS) -> dict[str, Any]:
    messages = [{"role": "user", "content": marker}]
    return {"model": TINY, "messages": messages, "max_tokens": tokens, "temperature": 0}


@dataclass(frozen=True)
class Seen:
    """What a cell of the matrix looked like, from outside and in the ledger."""

    fault: str
    moment: str
    client: str
    sent_tokens: int
    billed_tokens: int
    ledger: str
    closed_s: float
    counted: bool = True  # whether it is of one request, whose tokens were counted


class Ask:
    """One streamed request, read by a thread of its own from now on."""

    def __init__(self, site: "Site", marker: str, tokens: int = TOKENS) -> None:
        self.status: int | None = None
        self.code: str | None = None
        self.request_id = ""
        self.tokens = 0
        self.pending: list[tuple[float, int]] = []  # when (time.monotonic) how many tokens had come
        self.finish_reason: str | None = None
        self.broken: str | None = None
        self._site = site
        self._body = body(marker, tokens) | {"stream": True, "logprobs": True}
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def outcome(self) -> str:
        """How it ended, in the words of docs/faults.md."""
        if self.finish_reason is not None:
            return "the whole answer"
        if self.status == 200:
            return f"an error event ({self.code})" if self.code else "a stream that is cut off"
        if self.status is None:
            return f"no answer ({self.broken})"
        return f"{self.status} ({self.code})" if self.code else f"{self.status}"

    def wait_begun(self) -> None:
        assert self._begun.wait(60), "the stream did not begin in time"

    def wait_ended(self, timeout_s: float = 90) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the stream did not end in time"

    def tokens_at(self, moment_s: float) -> int:
        """How many had come by then."""
        return max((tokens for at_s, tokens in self.pending if at_s <= moment_s), default=0)

    def _read(self) -> None:
        url, key = f"{self._site.url}/v1/chat/completions", self._site.keys[TENANT]
        try:
            with httpx.stream(
                "POST", url, json=self._body, headers={"Authorization": f"Bearer {key}"}, timeout=120
            ) as answer:
                self.status, self.request_id = answer.status_code, answer.headers.get("x-request-id", "")
                if answer.status_code != 200:
                    self._fail(answer.read())
                    return
                for line in answer.iter_lines():
                    if line and line != "data: [DONE]":
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError as error:
            self.broken = type(error).__name__

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.code = event["error"]["code"]
        for choice in event.get("choices", ()):
            self.finish_reason = choice["finish_reason"]
            self.tokens += len((choice.get("logprobs") or {}).get("content") or ())
            self.pending.append((time.monotonic(), self.tokens))
            if self.tokens:
                self._begun.set()

    def _fail(self, content: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            self.code = json.loads(content)["error"]["code"]


@dataclass(frozen=True)
class Site(Live):
    postgres: Postgres
    traps: FailPoints
    seen: list[Seen]

    def pids(self, deployment: str) -> set[int]:
        """The live replicas' processes."""
        return {replica["pid"] for replica in live_replicas(deployment) if replica["state"] == "RUNNING"}

    def wait_whole(self) -> None:
        """Every replica is there, and answers."""

        def whole() -> bool:
            counts = {"gateway": GATEWAYS, "steward": 1, ENGINE: 1}
            return all(len(self.pids(name)) == count for name, count in counts.items()) and self._ready()

        wait_until(whole, REPLACED_S_MAX, 0.1)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self, *deployments: str, also: int | None = None) -> None:
        """SIGKILL for the process `also`, and for all replicas of `deployments` and their children."""
        victims = [] if also is None else [psutil.Process(also)]
        for deployment in deployments:
            for pid in self.pids(deployment):
                replica = psutil.Process(pid)
                victims += [replica, *replica.children(recursive=True)]
        assert victims
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def wait_hit(self, point: str, marker: str) -> Hit:
        found: list[Hit] = []

        def hit() -> bool:
            one = self.traps.hit(point, marker)
            found.extend([one] if one else [])
            return one is not None

        wait_until(hit, 60, 0.01)
        return found[0]

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

    def observe(self, fault: str, moment: str, ask: Ask, request_id: str, closed_s: float) -> Seen:
        closing, event = self.closing(request_id), self.event(request_id)
        assert closing is not None
        said = f"settled, {event['status']}" if event else f"void, {closing['reason']}"
        billed = event["completion_tokens"] if event else 0
        seen = Seen(fault, moment, ask.outcome, ask.tokens, billed, said, round(closed_s, 1))
        self.seen.append(seen)
        return seen

    def note(self, fault: str, moment: str, client: str, ledger: str, seconds: float = 0.0) -> None:
        """An observation that is not of one request."""
        self.seen.append(Seen(fault, moment, client, 0, 0, ledger, round(seconds, 1), counted=False))

    def check(self) -> None:
        """What must be so after every fault, once it is over; waited for within bounds."""
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
        drifts = [(one.prompt_drift, one.completion_drift) for one in self.drift()]
        assert drifts == [(0, 0)]

    def drift(self) -> list[Reconciliation]:
        """As `bespoke usage check` computes it; a gateway that has just died is not asked twice."""
        found: list[Reconciliation] = []

        def told() -> bool:
            try:
                found[:] = reconcile(engine_counts(self.url), UsageQueries(self.store).by_engine())
            except OperatorError:
                return False
            return bool(found)

        wait_until(told, REPLACED_S_MAX, 0.2)
        return found


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from serve.deployment import ray_app as deployment
    from serve.deployment.local import LocalService

    home = tmp_path_factory.mktemp("faults")
    import_tiny(home)
    seen: list[Seen] = []
    with Postgres() as postgres, pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment, "GatewayDeployment", FaultyGateway)
        patch.setattr(deployment, "EngineDeployment", FaultyEngine)
        patch.setattr(deployment, "StewardDeployment", FaultySteward)
        settings = Settings(
            home=home,
            port=free_port(),
            bases=[TINY],
            database_url=SecretStr(postgres.create_database()),
            gateway_replicas=GATEWAYS,
            accept_timeout_s=10,
            drain_timeout_s=5,
            engine=EngineSettings(dtype="float32", max_model_len=1024, max_loras=0, enforce_eager=True),
        )
        with contextlib.closing(Store(settings.store_url)) as store:
            keys = onboard(store, home, TENANTS)
            with LocalService(settings) as service:
                yield Site(service.url, settings, store, keys, postgres, FailPoints(home), seen)
            # What the service did not start, it does not end.
            assert [check for check in verify(store) if check.mismatches] == []
    if path := os.environ.get(OBSERVATIONS):
        Path(path).write_text(json.dumps([asdict(one) for one in seen], indent=1))


@pytest.fixture
def whole(site: Site) -> Iterator[Site]:
    """The site with all its replicas; afterwards the ledger is right."""
    site.wait_whole()
    yield site
    site.check()


def since(start_s: float) -> float:
    return time.monotonic() - start_s
