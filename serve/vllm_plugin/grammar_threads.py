"""Compiles new grammars in vLLM's core on a thread of low priority, and known ones beside it.

vLLM compiles on as many threads as half the processors, first come, first served: on a small machine one
costly grammar holds up every tenant's cheap one, and takes the processor from the model's step.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from serve.vllm_plugin import upstream

# A thread may have its own on Linux. It holds the interpreter lock now and then, so it must not wait long
# for a processor: with 15 the model's step was seen to wait with it.
NICENESS = 5
_BYTES_AT_LEAST = 1024


def install() -> None:
    upstream.replace_grammar_threads(GrammarThreads)


class GrammarThreads:
    """Stands in for the ThreadPoolExecutor of vLLM's StructuredOutputManager.

    A grammar is known while all that were used since fit into half of the compiler's own cache
    (`cache_bytes`). A known one costs a look-up.
    """

    def __init__(self, pool: ThreadPoolExecutor, cache_bytes: int) -> None:
        self._known_pool = pool
        self._new_pool = ThreadPoolExecutor(1, "new-grammars", initializer=_lower_priority)
        self._bytes_max = cache_bytes // 2
        self._bytes = 0
        self._known: OrderedDict[Any, int] = OrderedDict()
        self._lock = threading.Lock()

    def submit(self, create: Callable[[Any], Any], request: Any) -> "Future[Any]":
        key = request.structured_output_request.structured_output_key
        with self._lock:
            if known := key in self._known:
                self._known.move_to_end(key)
        if known:
            return self._known_pool.submit(create, request)
        return self._new_pool.submit(self._create, create, request, key)

    def _create(self, create: Callable[[Any], Any], request: Any, key: Any) -> Any:
        grammar = create(request)
        size = max(_BYTES_AT_LEAST, upstream.compiled_bytes(grammar))
        with self._lock:
            self._bytes += size - self._known.pop(key, 0)
            self._known[key] = size
            while self._bytes > self._bytes_max and len(self._known) > 1:
                self._bytes -= self._known.popitem(last=False)[1]
        return grammar

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for pool in (self._new_pool, self._known_pool):
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)


def _lower_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
