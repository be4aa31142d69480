"""The gateway's side of an engine: a Ray Serve handle behind the engine seam.

The handle is passed in, so this module needs no ray; what ray raises for a lost replica or a full
queue is told apart by `classify`, which the composition root supplies.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from serve.engine.base import Counters, Event, GenerationRequest
from serve.errors import BespokeError, EngineFailed, EngineUnavailable, Overloaded

Classify = Callable[[BaseException], BespokeError | None]


class RemoteEngine:
    """All replicas of one base, reached through `handle`."""

    def __init__(
        self, handle: Any, *, context_tokens_max: int, accept_timeout_s: float, classify: Classify
    ) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._context_tokens_max = context_tokens_max
        self._accept_timeout_s = accept_timeout_s
        self._classify = classify

    @property
    def context_tokens_max(self) -> int:
        return self._context_tokens_max

    async def stream(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        """See `serve.engine.base.Engine.stream`. Not accepted in time is EngineUnavailable."""
        batches = self._streaming.stream.remote(request)
        accepted = finished = False
        try:
            while True:
                timeout_s = None if accepted else self._accept_timeout_s
                batch: list[Event] = await asyncio.wait_for(anext(batches), timeout_s)
                accepted = True
                yield batch
        except StopAsyncIteration:
            finished = True
        except TimeoutError as error:
            raise EngineUnavailable() from error
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            raise self._translate(error, accepted=accepted) from error
        finally:
            if not finished:
                batches.cancel()

    async def abort(self, request_id: str) -> None:
        """Told to every replica: only the one that has the request acts on it."""
        await self._broadcast("abort", request_id)

    async def counters(self) -> list[Counters]:
        return list(await self._broadcast("counters"))

    async def _broadcast(self, method: str, *args: object) -> list[Any]:
        try:
            response = self._handle.broadcast(method, *args)
            results = await response.results_async(timeout_s=self._accept_timeout_s)
        except TimeoutError as error:
            raise EngineUnavailable() from error
        except Exception as error:
            raise self._translate(error, accepted=False) from error
        if not results:
            raise EngineUnavailable()
        return list(results)

    def _translate(self, error: BaseException, *, accepted: bool) -> BespokeError:
        cause = getattr(error, "cause", error)  # ray wraps what a replica raised
        known = cause if isinstance(cause, BespokeError) else self._classify(error)
        if accepted and (known is None or isinstance(known, EngineUnavailable | Overloaded)):
            return EngineFailed()
        return known or EngineFailed()
