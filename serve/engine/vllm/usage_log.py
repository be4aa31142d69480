"""What a replica did for its last requests: for whoever must bill one whose gateway died."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator

from serve.billing.metering.terms import RequestUsage
from serve.errors import EngineUnavailable

KEPT_MAX = 20_000  # minutes of requests, under the heaviest load
END_TIMEOUT_S = 10.0


class UsageLog:
    """`abort` makes the engine end a request that runs; its counts are then soon final."""

    def __init__(self, abort: Callable[[str], Awaitable[None]]) -> None:
        self._abort = abort
        self._running: dict[str, asyncio.Event] = {}
        self._kept: OrderedDict[str, RequestUsage | None] = OrderedDict()

    @contextlib.contextmanager
    def recording(self, request_id: str, count: Callable[[], RequestUsage]) -> Iterator[None]:
        """Remember `count()` of the request at the end of the block, however that ends.

        Raises EngineUnavailable if somebody has ended the request before it began.
        """
        if request_id in self._kept:
            raise EngineUnavailable()
        ended = self._running[request_id] = asyncio.Event()
        try:
            yield
        finally:
            self._keep(request_id, count())
            del self._running[request_id]
            ended.set()

    async def final_usage(self, request_id: str) -> RequestUsage | None:
        """End the request for good, also if it has not begun. None if nothing was done for it.

        Raises TimeoutError if the engine does not end it.
        """
        if (ended := self._running.get(request_id)) is not None:
            await self._abort(request_id)
            async with asyncio.timeout(END_TIMEOUT_S):
                await ended.wait()
        elif request_id not in self._kept:
            self._keep(request_id, None)
        return self._kept.get(request_id)

    def _keep(self, request_id: str, final: RequestUsage | None) -> None:
        self._kept[request_id] = final
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)
