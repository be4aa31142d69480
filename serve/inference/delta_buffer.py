"""Buffers deltas between the engine and one slow client.

The engine never waits. A client that falls behind gets larger batches.
"""

import asyncio
from collections.abc import AsyncIterator

from serve.engine.protocol import Delta


class DeltaBuffer:
    """Holds the deltas that one reader has not taken yet.

    Every token passes here, and an asyncio.Queue would cost more: one list and one future do.
    """

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._ended = False
        self._failure: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, deltas: list[Delta]) -> None:
        self._deltas = self._deltas + deltas if self._deltas else deltas
        self._wake()

    def end(self, failure: Exception | None) -> None:
        """End the stream: the reader gets the remaining deltas, then `failure` is raised, if there is one."""
        self._ended, self._failure = True, failure
        self._wake()

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Batches of deltas: all that are there at once. For one reader."""
        loop = asyncio.get_running_loop()
        while True:
            if self._deltas:
                deltas, self._deltas = self._deltas, []
                yield deltas
            elif self._ended:
                if self._failure is not None:
                    raise self._failure
                return
            else:
                self._reader = loop.create_future()
                await self._reader

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
