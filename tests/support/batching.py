"""Runs batches over an engine that repeats its prompt, with workers that die on request."""

import asyncio
import json
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from serve.batches.batches import Batch, Batches
from serve.batches.input import InputBounds
from serve.batches.lines import Lines
from serve.batches.worker import BatchWorker
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import usage_table
from serve.billing.metering.terms import RequestUsage
from serve.billing.pricing.plans import BatchRates, Prices, Rates
from serve.client_data.files import FileBounds, Files
from serve.engine.protocol import (
    Accepted,
    Counters,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Message,
    Take,
    Texts,
)
from serve.errors import EngineFailed
from serve.formats.sampling import RequestBounds
from serve.inference.gateway import Gateway
from serve.observability.metrics import Metrics
from serve.rate_limits import RateLimiter
from serve.registry.registry import AdapterRegistry
from serve.storage.database import Store
from serve.tenants import Tenants, server_secret
from tests.support.constants import NOON, PLAN, TINY

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
HALF = Rates(
    prompt_nanos_per_mtok=50_000_000,
    cached_prompt_nanos_per_mtok=25_000_000,
    completion_nanos_per_mtok=200_000_000,
)
VECTOR = struct.pack("<2f", 0.6, 0.8)  # of each text that is embedded, for 3 tokens
COST_NANOS = 10 * 50 + 2 * 200  # of one line at HALF
LEASE = timedelta(seconds=60)
BOUNDS = FileBounds(file_bytes=1 << 20, files_per_tenant=10, bytes_per_tenant=1 << 21)
FIELDS = RequestBounds(messages=8, n=4, stop_sequences=4, completion_tokens=100, tools=4, prompts=4)
INPUT = InputBounds(lines=50, body_bytes=10_000, fields=FIELDS)


class Died(BaseException):
    """The process has died."""


class MortalStore(Store):
    """Lets its process die at the `death_at`-th write transaction: before it, or right after its commit."""

    def __init__(self, url: str, death_at: int, *, after: bool) -> None:
        super().__init__(url)
        self.died = asyncio.Event()
        self._writes, self._death_at, self._after, self._dead = count(1), death_at, after, False
        self._loop = asyncio.get_running_loop()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        if self._dead:
            raise Died
        with super().read() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        is_last = next(self._writes) == self._death_at
        if self._dead or (is_last and not self._after):
            self._die()
        with super().write() as connection:
            yield connection
        if self._dead or is_last:
            self._die()

    def _die(self) -> None:
        self._dead = True
        self._loop.call_soon_threadsafe(self.died.set)
        raise Died


class EchoEngine:
    """Answers with the last message. `faults` are raised instead, one per attempt at a text.

    `gate`: answers wait for it. `breaks_at`: the text whose answer breaks off in the middle.
    """

    context_tokens_max = 1000
    embedding_size: int | None = None

    def __init__(self, faults: dict[str, list[BaseException]] | None = None) -> None:
        self.faults = faults or {}
        self.attempts: Counter[str] = Counter()
        self.running = self.running_max = 0
        self.gate: asyncio.Event | None = None
        self.breaks_at: str | None = None

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        async for batch in self._play(request):
            take(batch)

    async def _play(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        if isinstance(request.prompt, Texts):
            assert request.pooling is not None
            count = len(request.prompt.prompts)
            yield [Accepted("r", "b", 3 * count)]
            yield [
                *(Delta(part, "", 0, "stop", embedding=VECTOR) for part in range(count)),
                Finished(3 * count, 0, 0, aborted=False),
            ]
            return
        last = request.prompt[-1] if isinstance(request.prompt, tuple) else None
        assert isinstance(last, Message)
        text = last.content or ""
        self.attempts[text] += 1
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if faults := self.faults.get(text):
                raise faults.pop(0)
            yield [Accepted("r", "b", 10)]
            if text == self.breaks_at:
                yield [Delta(0, text, 1)]
                raise EngineFailed()
            yield [Delta(0, text, 2, "stop"), Finished(10, 0, 2, aborted=False)]
        finally:
            self.running -= 1

    async def abort(self, request_id: str) -> None:
        pass

    async def final_usage(self, request_id: str) -> list[RequestUsage]:
        return []

    async def counters(self) -> list[Counters]:
        return []


class BatchFixture:
    """Holds a home and a store with the tenants acme and rival; `worker` starts a process on them."""

    def __init__(self, home: Path, url: str) -> None:
        self.home = home
        self.url = url
        self.store = Store(url)
        self.at = NOON
        self.engine = EchoEngine()
        self.files = Files(self.store, home / "files", BOUNDS)
        self.batches = Batches(self.store, self.files, per_tenant=3)
        self.lines = Lines(self.store)
        self.ledger = Ledger(self.store)
        self.tenants = Tenants(self.store, server_secret(home))
        prices = Prices(self.store)
        prices.publish(PLAN.model_copy(update={"batch": BatchRates(base=HALF, adapter=HALF)}), at=NOON)
        for tenant in ("acme", "rival"):
            self.tenants.create(tenant, at=NOON)
            self.ledger.open_account(tenant, 10**9)
            prices.subscribe(tenant, PLAN.name, at=NOON)
            self.tenants.create_key(tenant, at=NOON)

    def key_of(self, tenant: str) -> str:
        return self.tenants.keys.page(tenant).items[0].id

    def upload(self, content: bytes, *, tenant: str = "acme", purpose: str = "batch") -> str:
        draft = self.files.draft(tenant)
        draft.write(content)
        return self.files.add(draft, tenant, purpose=purpose, filename="in.jsonl", at=self.at).id

    def submit(self, content: bytes, *, tenant: str = "acme", endpoint: str = CHAT) -> Batch:
        return self.batches.create(
            tenant,
            self.key_of(tenant),
            endpoint=endpoint,
            input_file_id=self.upload(content, tenant=tenant),
            metadata=None,
            at=self.at,
        )

    def now(self) -> datetime:
        return self.at

    def worker(self, store: Store | None = None, *, requests_in_flight: int = 2) -> BatchWorker:
        store = store or self.store
        gateway = Gateway(
            store=store,
            registry=AdapterRegistry(store, [TINY]),
            engines={TINY: self.engine},
            rate_limiter=RateLimiter(store, "g"),
            commit_queue=CommitQueue(Ledger(store)),
            checkpoints=None,
            metrics=Metrics(adapters_max=0),
            request_timeout_s=60,
            first_token_timeout_s=60,
            now=self.now,
        )
        return BatchWorker(
            store=store,
            gateway=gateway,
            tenants=Tenants(store, server_secret(self.home)),
            files=Files(store, self.home / "files", BOUNDS),
            bounds=INPUT,
            requests_in_flight=requests_in_flight,
            lease=LEASE,
            idle_s=0.01,
            now=self.now,
        )

    def work(self) -> None:
        """Run batches in a healthy process until there are none."""

        async def run_all() -> None:
            worker = self.worker()
            while await worker.run_one():
                pass

        asyncio.run(run_all())

    def work_and_die(self, death_at: int, *, after: bool, requests_in_flight: int = 2) -> bool:
        """Run a process until it dies. False if it finished before that."""

        async def mortal() -> bool:
            store = MortalStore(self.url, death_at, after=after)
            worker = self.worker(store, requests_in_flight=requests_in_flight)
            working = asyncio.create_task(worker.run_one())
            dying = asyncio.create_task(store.died.wait())
            await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()  # nothing that they do about it reaches the store
            await asyncio.gather(*rest, return_exceptions=True)
            store.close()
            return store.died.is_set()

        return asyncio.run(mortal())

    def output(self, batch: Batch) -> list[Json]:
        return self._read(batch.tenant, self.batches.get(batch.tenant, batch.id).output_file_id)

    def errors(self, batch: Batch) -> list[Json]:
        return self._read(batch.tenant, self.batches.get(batch.tenant, batch.id).error_file_id)

    def _read(self, tenant: str, file_id: str | None) -> list[Json]:
        if file_id is None:
            return []
        file = self.files.get(tenant, file_id, at=self.at)
        text = self.files.path_of(tenant, file_id).read_text()
        assert len(text.encode()) == file.bytes
        return [json.loads(line) for line in text.splitlines()]

    def bills(self) -> list[Any]:
        with self.store.read() as connection:
            return list(connection.execute(sa.select(usage_table).order_by(usage_table.c.id)))


def line(custom_id: str, *, url: str = CHAT, **body: Any) -> Json:
    defaults = {"model": TINY, "messages": [{"role": "user", "content": custom_id}], "max_tokens": 5}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": defaults | body}


def jsonl(*lines: Json) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in lines)
