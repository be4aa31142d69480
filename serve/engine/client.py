"""Presents all replicas of a base to a gateway as one engine: picks a replica, queues, retries discovery.

Requests travel over connections of their own (`transport`). Questions to every replica go through a Ray Serve
handle. The handle is passed in, so this module needs no ray. `classify` translates ray's errors; the
composition root supplies it.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from serve.billing.metering.terms import RequestUsage
from serve.engine.protocol import Counters, GenerationRequest, Take
from serve.engine.router import choose
from serve.engine.transport.gateway_side import PendingRequest, ReplicaConnection, ReplicaListener
from serve.errors import BespokeError, EngineFailed, EngineLost, EngineUnavailable, Overloaded

log = logging.getLogger(__name__)

DISCOVERY_INTERVAL_S = 2.0
# How long a request waits when there is no replica: one that was just lost is not back sooner.
REPLICA_WAIT_S = 2.0

Classify = Callable[[BaseException], BespokeError | None]


class RemoteEngine:
    """Implements the Engine protocol over all replicas of `base`.

    It reaches them through `handle`, and over `listener` once `discover` runs.
    """

    def __init__(
        self,
        base: str,
        handle: Any,
        listener: ReplicaListener,
        *,
        context_tokens_max: int,
        queued_max: int,
        accept_timeout_s: float,
        classify: Classify,
        embedding_size: int | None = None,
    ) -> None:
        self._handle = handle
        self._listener = listener
        self._context_tokens_max = context_tokens_max
        self._embedding_size = embedding_size
        self._queued_max = queued_max
        self._accept_timeout_s = accept_timeout_s
        self._classify = classify
        self._replicas: list[ReplicaConnection] = []
        self._queue: deque[tuple[PendingRequest, asyncio.Future[ReplicaConnection]]] = deque()
        self._replica_needed = asyncio.Event()
        self._replica_joined = asyncio.Event()
        listener.pools[base] = self

    @property
    def context_tokens_max(self) -> int:
        return self._context_tokens_max

    @property
    def embedding_size(self) -> int | None:
        return self._embedding_size

    async def discover(self) -> None:
        """Asks replicas to connect, regularly and at once when one is missing. Never returns."""
        address = await self._listener.address()
        discovery_failed = False
        while True:
            self._replica_needed.clear()
            try:
                await self._broadcast("connect", address)
                discovery_failed = False
            except BespokeError as error:
                if not discovery_failed:
                    log.warning("no replica was met: %s", type(error).__name__)
                discovery_failed = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._replica_needed.wait(), DISCOVERY_INTERVAL_S)
                await asyncio.sleep(0.1)

    # --- requests ---

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        """See `serve.engine.protocol.Engine.generate`.

        Raises EngineUnavailable if no replica accepts in time, and EngineLost, before or after Accepted, if
        the replica dies.
        """
        pending = PendingRequest(request, take)
        replica = None
        try:
            async with asyncio.timeout(self._accept_timeout_s):
                replica = await self._place(pending)
                await pending.begun
            await pending.over
        except TimeoutError as error:
            raise EngineUnavailable() from error
        except EngineLost:
            raise
        except (EngineUnavailable, Overloaded) as error:
            if pending.accepted:
                raise EngineFailed() from error
            raise
        finally:
            if replica is not None:
                replica.release(pending)

    async def abort(self, request_id: str) -> None:
        """Asks the request's replica to stop. If no replica has it, the request or its replica has ended."""
        for replica in self._replicas:
            if replica.abort(request_id):
                return

    async def _place(self, pending: PendingRequest) -> ReplicaConnection:
        """Gives the request to a replica. While all are full it waits in a queue."""
        if not self._replicas:
            await self._await_replica()
        if not self._queue and (replica := self._choose(pending)) is not None:
            replica.start(pending)
            return replica
        if len(self._queue) >= self._queued_max:
            raise Overloaded()
        turn: asyncio.Future[ReplicaConnection] = asyncio.get_running_loop().create_future()
        self._queue.append((pending, turn))
        try:
            return await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # placed and given up at the same time
                turn.result().release(pending)
            raise

    async def _await_replica(self) -> None:
        self._replica_joined.clear()
        self._replica_needed.set()
        try:
            await asyncio.wait_for(self._replica_joined.wait(), REPLICA_WAIT_S)
        except TimeoutError as error:
            raise EngineUnavailable() from error

    def _choose(self, pending: PendingRequest) -> ReplicaConnection | None:
        adapter = pending.request.adapter
        candidates = [replica for replica in self._replicas if not replica.draining]
        return choose(None if adapter is None else adapter.id, candidates)

    def joined(self, replica: ReplicaConnection) -> None:
        self._replicas.append(replica)
        self._replica_joined.set()
        self.changed()

    def left(self, replica: ReplicaConnection) -> None:
        self._replicas.remove(replica)
        self._replica_needed.set()

    def changed(self) -> None:
        while self._queue:
            pending, turn = self._queue[0]
            if not turn.done():
                if (replica := self._choose(pending)) is None:
                    return
                replica.start(pending)
                turn.set_result(replica)
            self._queue.popleft()

    # --- questions to every replica ---

    async def final_usage(self, request_id: str) -> list[RequestUsage]:
        """See `serve.engine.protocol.Engine.final_usage`."""
        results = await self._broadcast("final_usage", request_id)
        for result in results:
            # A replica that died took its counts with it.
            if isinstance(result, BespokeError) and not isinstance(result, EngineLost):
                raise result
        return [result for result in results if isinstance(result, RequestUsage)]

    async def counters(self) -> list[Counters]:
        """The counters of the replicas that answer. Raises EngineUnavailable or EngineFailed if none does."""
        results = await self._broadcast("counters")
        counters = [result for result in results if isinstance(result, Counters)]
        if not counters:
            raise results[0]
        return counters

    async def _broadcast(self, method: str, *args: object) -> list[Any]:
        """Each replica's result, or its error in our terms.

        Raises EngineUnavailable if there is no replica.
        """
        try:
            response = self._handle.broadcast(method, *args)
            results = await response.results_async(timeout_s=self._accept_timeout_s, return_exceptions=True)
        except TimeoutError as error:
            raise EngineUnavailable() from error
        except Exception as error:
            raise self._translate(error) from error
        if not results:
            raise EngineUnavailable()
        return [
            self._translate(result) if isinstance(result, BaseException) else result for result in results
        ]

    def _translate(self, error: BaseException) -> BespokeError:
        cause = getattr(error, "cause", error)  # ray wraps what a replica raised
        translated = cause if isinstance(cause, BespokeError) else self._classify(error)
        return translated or EngineFailed()
