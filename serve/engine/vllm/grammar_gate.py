"""Lets grammars into an engine that are known to compile in bounded time, tenant after tenant.

One process compiles for all tenants of a replica, one grammar at a time. The tenants take turns, so one that
sends many grammars waits for itself. vLLM's core compiles each allowed grammar again; it gets no more at
once than this process has let through.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from time import monotonic

from serve.engine.protocol import GRAMMAR_CPU_S_BUCKETS, GrammarCounts
from serve.engine.vllm.grammar_process import Grammar, GrammarProcess, GrammarProcessFailed, Verdict
from serve.errors import EngineUnavailable, RateLimited

log = logging.getLogger(__name__)

WAITING_MAX = 8  # different grammars of one tenant
RETRY_AFTER_S = 3
REFUSED_MAX = 4_096
# A busy machine takes more CPU for the same work. What it could not compile is tried again later.
TOO_COMPLEX_FOR_S = 300.0

Digest = bytes


class VerdictCache:
    """Remembers verdicts, the lately used ones.

    The bytes of all allowed grammars are bounded: vLLM's core keeps twice as many, so what is known here need
    not be compiled there.
    """

    def __init__(self, bytes_max: int, now: Callable[[], float] = monotonic) -> None:
        self._bytes_max = bytes_max
        self._now = now
        self._allowed: OrderedDict[Digest, Verdict] = OrderedDict()
        self._refused: OrderedDict[Digest, tuple[Verdict, float]] = OrderedDict()
        self._bytes = 0

    def get(self, digest: Digest) -> Verdict | None:
        if (verdict := self._allowed.get(digest)) is not None:
            self._allowed.move_to_end(digest)
            return verdict
        verdict, since_s = self._refused.get(digest, (None, 0.0))
        if verdict is not None and verdict.too_complex and self._now() - since_s > TOO_COMPLEX_FOR_S:
            del self._refused[digest]
            return None
        return verdict

    def put(self, digest: Digest, verdict: Verdict) -> None:
        if not verdict.allowed:
            self._refused[digest] = verdict, self._now()
            while len(self._refused) > REFUSED_MAX:
                self._refused.popitem(last=False)
            return
        self._allowed[digest] = verdict
        self._bytes += verdict.bytes
        while self._bytes > self._bytes_max:
            _, dropped = self._allowed.popitem(last=False)
            self._bytes -= dropped.bytes


@dataclass(slots=True)
class _Job:
    grammar: Grammar
    waiters: list[asyncio.Future[Verdict]] = field(default_factory=list)


class GrammarGate:
    """Gives a verdict on each grammar. Belongs to one event loop."""

    def __init__(self, process: GrammarProcess, cache: VerdictCache) -> None:
        self._process = process
        self._cache = cache
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._queues: OrderedDict[str, OrderedDict[Digest, _Job]] = OrderedDict()  # tenants in their turn
        self._dispatcher: asyncio.Task[None] | None = None
        self._counts = GrammarCounts()

    @property
    def counts(self) -> GrammarCounts:
        """What the gate has done since the replica started, and how many grammars wait now."""
        return replace(self._counts, waiting=sum(len(queue) for queue in self._queues.values()))

    async def verdict(self, tenant: str, grammar: Grammar) -> Verdict:
        """Compiles the grammar, unless it is known. Raises RateLimited, EngineUnavailable."""
        digest = _digest(grammar)
        if (known := self._cache.get(digest)) is not None:
            return known
        queue = self._queues.setdefault(tenant, OrderedDict())
        if digest not in queue and len(queue) >= WAITING_MAX:
            self._counts = replace(self._counts, overloads=self._counts.overloads + 1)
            raise RateLimited("new schemas being compiled", WAITING_MAX, len(queue), 1, RETRY_AFTER_S)
        waiter: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        queue.setdefault(digest, _Job(grammar)).waiters.append(waiter)
        if self._dispatcher is None:
            self._dispatcher = asyncio.create_task(self._dispatch())
        return await waiter

    async def _dispatch(self) -> None:
        """Compiles what waits, one grammar of each tenant in turn."""
        try:
            while self._queues:
                tenant, queue = self._queues.popitem(last=False)
                digest, job = next(iter(queue.items()))
                self._queues[tenant] = queue  # to the end
                if any(not waiter.done() for waiter in job.waiters):
                    await self._compile(digest, job)
                # Until here the grammar kept its place: whoever else wants it joins, and it counts as one.
                del queue[digest]
                if not queue:
                    del self._queues[tenant]
        finally:
            self._dispatcher = None

    async def _compile(self, digest: Digest, job: _Job) -> None:
        verdict = self._cache.get(digest)  # another tenant's may have been the same
        if verdict is None:
            loop = asyncio.get_running_loop()
            try:
                verdict = await loop.run_in_executor(self._thread, self._process.compile, job.grammar)
            except Exception as error:
                log.warning("a grammar got no verdict", exc_info=not isinstance(error, GrammarProcessFailed))
                for waiter in job.waiters:
                    if not waiter.done():
                        waiter.set_exception(EngineUnavailable(retry_after_s=RETRY_AFTER_S))
                return
            self._counts = _counted(self._counts, verdict)
            self._cache.put(digest, verdict)
        for waiter in job.waiters:
            if not waiter.done():
                waiter.set_result(verdict)

    def close(self) -> None:
        self._process.close()
        self._thread.shutdown(wait=False, cancel_futures=True)


def _counted(counts: GrammarCounts, verdict: Verdict) -> GrammarCounts:
    bucket = sum(verdict.cpu_s > bound for bound in GRAMMAR_CPU_S_BUCKETS)
    return replace(
        counts,
        wrong=counts.wrong + (verdict.error is not None),
        too_complex=counts.too_complex + verdict.too_complex,
        cpu_s=counts.cpu_s + verdict.cpu_s,
        buckets=tuple(count + (number == bucket) for number, count in enumerate(counts.buckets)),
    )


def _digest(grammar: Grammar) -> Digest:
    parts = (grammar.kind, grammar.text, *grammar.schemas)
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
