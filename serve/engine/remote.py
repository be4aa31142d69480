"""The gateway's side of an engine: a Ray Serve handle and a channel behind the engine seam.

The handle is passed in, so this module needs no ray; what ray raises for a lost replica or a full
queue is told apart by `classify`, which the composition root supplies.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from serve.engine.base import Counters, Final, GenerationRequest, Take
from serve.engine.channel import Arrivals, Inbox
from serve.errors import BespokeError, EngineFailed, EngineLost, EngineUnavailable, Overloaded

LIVENESS_INTERVAL_S = 2.0
LAST_WORD_TIMEOUT_S = 5.0

Classify = Callable[[BaseException], BespokeError | None]


class RemoteEngine:
    """All replicas of one base, reached through `handle`; what they generate comes to `inbox`."""

    def __init__(
        self,
        handle: Any,
        inbox: Inbox,
        *,
        context_tokens_max: int,
        accept_timeout_s: float,
        classify: Classify,
    ) -> None:
        self._handle = handle
        self._inbox = inbox
        self._context_tokens_max = context_tokens_max
        self._accept_timeout_s = accept_timeout_s
        self._classify = classify
        self._watching: set[asyncio.Task[None]] = set()

    @property
    def context_tokens_max(self) -> int:
        return self._context_tokens_max

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        """See `serve.engine.base.Engine.generate`. Not accepted in time is EngineUnavailable.

        Raises EngineLost, before or after Accepted, if the replica dies.
        """
        address = await self._inbox.address()
        with self._inbox.expecting(request.request_id, take) as arrivals:
            answer = self._handle.generate.remote(request, address)
            watching = asyncio.create_task(_watch(answer, arrivals))
            self._watching.add(watching)  # the loop itself would not keep it
            watching.add_done_callback(self._watching.discard)
            try:
                await self._begun(arrivals)
                await arrivals.over
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                raise self._translate(error, accepted=arrivals.begun.done()) from error
            finally:
                if not arrivals.finished:
                    watching.cancel()
                    answer.cancel()

    async def _begun(self, arrivals: Arrivals) -> None:
        """The request is accepted, or over; else EngineUnavailable: soon if no replica lives."""
        deadline_s = asyncio.get_running_loop().time() + self._accept_timeout_s
        while not (arrivals.begun.done() or arrivals.over.done()):
            left_s = deadline_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise EngineUnavailable()
            await asyncio.wait(
                {arrivals.begun, arrivals.over},
                timeout=min(LIVENESS_INTERVAL_S, left_s),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not (arrivals.begun.done() or arrivals.over.done()):
                # Ray would queue for a replica that may never come. One that died proves
                # nothing: this request may be with another; the dead are not asked again.
                with contextlib.suppress(EngineLost, TimeoutError):
                    async with asyncio.timeout_at(deadline_s):
                        await self.counters()

    async def abort(self, request_id: str) -> None:
        """Told to every replica: only the one that has the request acts on it."""
        for result in await self._broadcast("abort", request_id):
            # With a replica that died the request has ended too, and says so itself.
            if isinstance(result, BespokeError) and not isinstance(result, EngineLost):
                raise result

    async def finals(self, request_id: str) -> list[Final]:
        """See `serve.engine.base.Engine.finals`."""
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
            raise self._translate(error, accepted=False) from error
        if not results:
            raise EngineUnavailable()
        return [
            self._translate(result, accepted=False) if isinstance(result, BaseException) else result
            for result in results
        ]

    def _translate(self, error: BaseException, *, accepted: bool) -> BespokeError:
        cause = getattr(error, "cause", error)  # ray wraps what a replica raised
        known = cause if isinstance(cause, BespokeError) else self._classify(error)
        if isinstance(known, EngineLost):
            return known
        if accepted and (known is None or isinstance(known, EngineUnavailable | Overloaded)):
            return EngineFailed()
        return known or EngineFailed()


async def _watch(answer: Any, arrivals: Arrivals) -> None:
    """Tell `arrivals` how the call ended, after everything that the replica has sent."""
    try:
        await answer
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        if arrivals.connection is not None or isinstance(getattr(error, "cause", None), BespokeError):
            await arrivals.complete(LAST_WORD_TIMEOUT_S)
        arrivals.fail(error)
    else:
        await arrivals.complete(LAST_WORD_TIMEOUT_S)
        arrivals.fail(EngineFailed())  # unless its last word was read before
