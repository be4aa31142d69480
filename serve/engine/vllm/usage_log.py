"""Remembers what a replica did for its last requests, so that one whose gateway died can be billed."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator

from serve.billing.metering.terms import RequestUsage
from serve.errors import EngineUnavailable

ENTRIES_MAX = 20_000  # minutes of requests, under the heaviest load
END_TIMEOUT_S = 10.0


class UsageLog:
    """Records the usage of requests.

    `abort` makes the engine end one that runs; its counts are final soon.
    """

    def __init__(self, abort: Callable[[str], Awaitable[None]]) -> None:
        self._abort = abort
        self._running: dict[str, asyncio.Event] = {}
        self._usages: OrderedDict[str, RequestUsage | None] = OrderedDict()

    @contextlib.contextmanager
    def recording(self, request_id: str, count: Callable[[], RequestUsage]) -> Iterator[None]:
        """Records `count()` of the request at the end of the block, however that ends.

        Raises EngineUnavailable if the request was ended before it began.
        """
        if request_id in self._usages:
            raise EngineUnavailable()
        ended = self._running[request_id] = asyncio.Event()
        try:
            yield
        finally:
            self._store(request_id, count())
            del self._running[request_id]
            ended.set()

    async def final_usage(self, request_id: str) -> RequestUsage | None:
        """Ends the request for good, also if it has not begun. None if nothing was done for it.

        Raises TimeoutError if the engine does not end it.
        """
        if (ended := self._running.get(request_id)) is not None:
            await self._abort(request_id)
            async with asyncio.timeout(END_TIMEOUT_S):
                await ended.wait()
        elif request_id not in self._usages:
            self._store(request_id, None)
        return self._usages.get(request_id)

    def _store(self, request_id: str, usage: RequestUsage | None) -> None:
        self._usages[request_id] = usage
        while len(self._usages) > ENTRIES_MAX:
            self._usages.popitem(last=False)
