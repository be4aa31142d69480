"""vLLM's outputs of one request, read in the moment in which vLLM puts them into its queues."""

import asyncio
from functools import partial
from typing import Any

from serve.engine.base import Take
from serve.engine.reading import Reader


class Tap:
    """Takes the place of a task that waits for each output: waking it would cost more than reading does.

    `take` gets the events until `ended` is done: with None after the last one, with what vLLM or the reading
    raised, or cancelled. What comes after that is only counted.
    """

    def __init__(self, reader: Reader, take: Take) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = reader
        self._take = take

    def open(self, part: int, queue: Any) -> None:
        """Read the RequestOutputCollector of the prompt number `part`, from what is in it already on."""
        early, queue.output = queue.output, None
        queue.put = partial(self._put, part)
        if early is not None:
            self._put(part, early)

    def _put(self, part: int, output: Any) -> None:
        # vLLM's caller serves all requests: nothing may be raised here.
        try:
            if isinstance(output, Exception):
                raise output
            batch = self._reader.read(part, output)
            if batch and not self.ended.done():
                self._take(batch)
        except Exception as error:
            if not self.ended.done():
                self.ended.set_exception(error)
            return
        if self._reader.finished and not self.ended.done():
            self.ended.set_result(None)
