"""In vLLM's core a new grammar is compiled on a slow thread, and never holds up a known one."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from serve.vllm_plugin.grammar_threads import NICENESS, GrammarThreads


def request(key: str) -> Any:
    return SimpleNamespace(structured_output_request=SimpleNamespace(structured_output_key=("json", key)))


def grammar(size: int) -> Any:
    return SimpleNamespace(ctx=SimpleNamespace(memory_size_bytes=size))


@contextmanager
def threads(cache_bytes: int = 1_000_000) -> Iterator[GrammarThreads]:
    made = GrammarThreads(ThreadPoolExecutor(1, "known"), cache_bytes)
    yield made
    made.shutdown(wait=True, cancel_futures=True)


def on(pool: GrammarThreads, key: str, size: int = 1_000) -> str:
    """The name of the thread that makes the grammar `key`."""
    names: list[str] = []

    def create(_: Any) -> Any:
        names.append(threading.current_thread().name.split("_")[0])
        return grammar(size)

    pool.submit(create, request(key)).result(30)
    return names[0]


def test_a_known_grammar_does_not_wait_for_a_new_one() -> None:
    with threads() as pool:
        assert on(pool, "known") == "new-grammars"
        may_end = threading.Event()
        slow = pool.submit(lambda _: may_end.wait(30) and grammar(1_000), request("slow"))
        assert on(pool, "known") == "known"
        assert not slow.done()
        may_end.set()
        slow.result(30)


def test_new_grammars_are_compiled_one_at_a_time_with_low_priority() -> None:
    niceness: list[int] = []

    def create(_: Any) -> Any:
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return grammar(1_000)

    with threads() as pool:
        for number in range(3):
            pool.submit(create, request(str(number))).result(30)
    assert niceness == [NICENESS] * 3
    assert os.getpriority(os.PRIO_PROCESS, 0) < NICENESS


def test_a_grammar_is_known_no_longer_than_the_compilers_cache_holds_it() -> None:
    with threads(cache_bytes=20_000) as pool:
        for number in range(12):
            on(pool, str(number))
            on(pool, "0")
        assert on(pool, "1") == "new-grammars"
        assert on(pool, "0") == "known"
        assert on(pool, "11") == "known"


def test_a_grammar_that_fails_is_not_known_and_the_next_one_compiles() -> None:
    def fail(_: Any) -> Any:
        raise ValueError("no grammar")

    with threads() as pool:
        for _ in range(2):
            assert isinstance(pool.submit(fail, request("bad")).exception(30), ValueError)
        assert on(pool, "bad") == "new-grammars"
