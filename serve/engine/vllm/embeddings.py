"""Makes the vectors of one request in vLLM, a few texts at a time, and counts their tokens.

vLLM's queue is first come, first served. A request that put thousands of texts into it at once would hold up
everybody who comes later, so each request has at most `WINDOW` texts there.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from serve.engine.protocol import Delta, Event, Finished
from serve.engine.vllm import upstream

WINDOW = 16


class EmbeddingRun:
    """Runs one request. `prompts` are token ids; `add` gives one to vLLM and returns vLLM's queue for it.

    A prompt counts once vLLM has returned its vector, which is when vLLM counts it, too. Vectors are told at
    the end and all together, so another replica can take over a request whose replica dies.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        dimensions: int | None,
        add: Callable[[int], Awaitable[Any]],
    ) -> None:
        self.aborted = False
        self.prompt_tokens = 0
        self._prompts = prompts
        self._dimensions = dimensions
        self._add = add
        self._deltas: list[Delta] = []
        self._queues: dict[int, Any] = {}  # of the prompts that vLLM has
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Returns when vLLM has none of the prompts any more. Raises what vLLM raised."""
        for part in range(len(self._prompts)):
            await self._wait_below(WINDOW)
            if self._ended:
                break
            queue = self._queues[part] = await self._add(part)
            upstream.redirect_outputs(queue, partial(self._put, part))
        await self._wait_below(1)
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        """Lets no more prompts begin. Those that have begun are the caller's to end."""
        self.aborted = True
        self._changed.set()

    @property
    def queues(self) -> list[Any]:
        return list(self._queues.values())

    @property
    def events(self) -> list[Event]:
        """The vectors that are there, then the end."""
        deltas = sorted(self._deltas, key=lambda delta: delta.index)
        aborted = self.aborted or len(deltas) < len(self._prompts)
        return [*deltas, Finished(self.prompt_tokens, 0, 0, aborted)]

    @property
    def _ended(self) -> bool:
        return self.aborted or self._error is not None

    async def _wait_below(self, count: int) -> None:
        while len(self._queues) >= count:
            self._changed.clear()
            await self._changed.wait()

    def _put(self, part: int, output: Any) -> None:
        # vLLM's caller serves all requests: nothing may be raised here.
        try:
            if isinstance(output, Exception):
                raise output
            vector = output.outputs.data
            if vector.numel():  # an aborted prompt has an empty one
                self.prompt_tokens += len(self._prompts[part])
                numbers = shortened(vector.float().numpy(), self._dimensions)
                self._deltas.append(Delta(part, "", 0, "stop", embedding=numbers.astype("<f4").tobytes()))
        except Exception as error:
            self._error = self._error or error
        if (queue := self._queues.pop(part, None)) is not None:
            queue.close()
        self._changed.set()


def shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Returns the first `dimensions` numbers, scaled so that the vector is as long as before.

    OpenAI's guide does the same: platform.openai.com/docs/guides/embeddings#use-cases, "Reducing embedding
    dimensions".
    """
    if dimensions is None or dimensions >= len(vector):
        return vector
    exact = vector.astype(np.float64)
    first = exact[:dimensions]
    length = float(np.linalg.norm(first))
    return first * (float(np.linalg.norm(exact)) / length) if length else first
