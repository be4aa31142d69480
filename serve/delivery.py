"""What of an answer waits for its reader: put by whoever generates, read once, as fast as the reader can."""

import asyncio
from collections.abc import AsyncIterator

from serve.engine.base import Delta


class Delivery:
    """Deltas gather while the reader is busy. Every token passes here, and a queue would cost more."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._over = False
        self._failure: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, deltas: list[Delta]) -> None:
        self._deltas = self._deltas + deltas if self._deltas else deltas
        self._wake()

    def end(self, failure: Exception | None) -> None:
        """Nothing more comes; once the reader has what there is, `failure` is raised, if there is one."""
        self._over, self._failure = True, failure
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        loop = asyncio.get_running_loop()
        while True:
            if self._deltas:
                deltas, self._deltas = self._deltas, []
                yield deltas
            elif self._over:
                if self._failure is not None:
                    raise self._failure
                return
            else:
                self._reader = loop.create_future()
                await self._reader
