"""The gateway's side of an engine: all replicas of a base behind the engine seam.

What goes with a request goes by the channel; what is asked of every replica goes through a Ray Serve
handle. The handle is passed in, so this module needs no ray; what ray raises for a lost replica is told
apart by `classify`, which the composition root supplies.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from serve.engine.protocol import Counters, Final, GenerationRequest, Take
from serve.engine.router import choose
from serve.engine.transport.gateway_side import Arrivals, Inbox, Replica
from serve.errors import BespokeError, EngineFailed, EngineLost, EngineUnavailable, Overloaded

log = logging.getLogger(__name__)

MEET_INTERVAL_S = 2.0
# A request waits for a replica for so long if there is none: one that was just lost is not back sooner.
NO_REPLICA_S = 2.0

Classify = Callable[[BaseException], BespokeError | None]


class RemoteEngine:
    """All replicas of `base`, reached through `handle` and, once `follow` runs, by `inbox`."""

    def __init__(
        self,
        base: str,
        handle: Any,
        inbox: Inbox,
        *,
        context_tokens_max: int,
        queued_max: int,
        accept_timeout_s: float,
        classify: Classify,
    ) -> None:
        self._handle = handle
        self._inbox = inbox
        self._context_tokens_max = context_tokens_max
        self._queued_max = queued_max
        self._accept_timeout_s = accept_timeout_s
        self._classify = classify
        self._replicas: list[Replica] = []
        self._queue: deque[tuple[Arrivals, asyncio.Future[Replica]]] = deque()
        self._lonely = asyncio.Event()
        self._met = asyncio.Event()
        inbox.fleets[base] = self

    @property
    def context_tokens_max(self) -> int:
        return self._context_tokens_max

    async def follow(self) -> None:
        """For ever: be introduced to replicas that have started; at once, when one is missed."""
        address = await self._inbox.address()
        missed = False
        while True:
            self._lonely.clear()
            try:
                await self._broadcast("meet", address)
                missed = False
            except BespokeError as error:
                if not missed:
                    log.warning("no replica was met: %s", type(error).__name__)
                missed = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lonely.wait(), MEET_INTERVAL_S)
                await asyncio.sleep(0.1)

    # --- requests ---

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        """See `serve.engine.protocol.Engine.generate`. Not accepted in time is EngineUnavailable.

        Raises EngineLost, before or after Accepted, if the replica dies.
        """
        arrivals = Arrivals(request, take)
        replica = None
        try:
            async with asyncio.timeout(self._accept_timeout_s):
                replica = await self._place(arrivals)
                await arrivals.begun
            await arrivals.over
        except TimeoutError as error:
            raise EngineUnavailable() from error
        except EngineLost:
            raise
        except (EngineUnavailable, Overloaded) as error:
            if arrivals.accepted:
                raise EngineFailed() from error
            raise
        finally:
            if replica is not None:
                replica.leave(arrivals)

    async def abort(self, request_id: str) -> None:
        """A request that no replica has here has ended, or its replica has."""
        for replica in self._replicas:
            if replica.abort(request_id):
                return

    async def _place(self, arrivals: Arrivals) -> Replica:
        """Give the request to a replica; while all are full it waits in line."""
        if not self._replicas:
            await self._meet_one()
        if not self._queue and (found := self._choose(arrivals)) is not None:
            found.start(arrivals)
            return found
        if len(self._queue) >= self._queued_max:
            raise Overloaded()
        turn: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
        self._queue.append((arrivals, turn))
        try:
            return await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # it was placed in the moment in which it was given up
                turn.result().leave(arrivals)
            raise

    async def _meet_one(self) -> None:
        self._met.clear()
        self._lonely.set()
        try:
            await asyncio.wait_for(self._met.wait(), NO_REPLICA_S)
        except TimeoutError as error:
            raise EngineUnavailable() from error

    def _choose(self, arrivals: Arrivals) -> Replica | None:
        adapter = arrivals.request.adapter
        there = [replica for replica in self._replicas if not replica.draining]
        return choose(None if adapter is None else adapter.id, there)

    def joined(self, replica: Replica) -> None:
        self._replicas.append(replica)
        self._met.set()
        self.changed()

    def left(self, replica: Replica) -> None:
        self._replicas.remove(replica)
        self._lonely.set()

    def changed(self) -> None:
        while self._queue:
            arrivals, turn = self._queue[0]
            if not turn.done():
                if (found := self._choose(arrivals)) is None:
                    return
                found.start(arrivals)
                turn.set_result(found)
            self._queue.popleft()

    # --- what is asked of every replica ---

    async def finals(self, request_id: str) -> list[Final]:
        """See `serve.engine.protocol.Engine.finals`."""
        results = await self._broadcast("finals", request_id)
        for result in results:
            # What a replica that died had counted is gone with its counters.
            if isinstance(result, BespokeError) and not isinstance(result, EngineLost):
                raise result
        return [result for result in results if isinstance(result, Final)]

    async def counters(self) -> list[Counters]:
        """Those of the replicas that answer; raises if none does."""
        results = await self._broadcast("counters")
        found = [result for result in results if isinstance(result, Counters)]
        if not found:
            raise results[0]
        return found

    async def _broadcast(self, method: str, *args: object) -> list[Any]:
        """Each replica's result, or what it raised in our terms. Raises EngineUnavailable without any."""
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
        known = cause if isinstance(cause, BespokeError) else self._classify(error)
        return known or EngineFailed()
