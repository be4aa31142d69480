"""Tenants take turns at the compiler, each waits for itself, and no verdict is asked for twice."""

import asyncio
import threading
from typing import Any

import pytest

from serve.engine.vllm.grammar_gate import (
    REFUSED_MAX,
    TOO_COMPLEX_FOR_S,
    WAITING_MAX,
    GrammarGate,
    VerdictCache,
)
from serve.engine.vllm.grammar_process import Grammar, GrammarProcessFailed, Verdict
from serve.errors import EngineUnavailable, RateLimited


class Compiler:
    """Stands in for the process: it answers when it is let, and notes what it was asked."""

    def __init__(self, verdict: Verdict | None = None) -> None:
        self.verdict = verdict or Verdict(bytes=10)
        self.asked: list[str] = []
        self.may_answer = threading.Event()
        self.fails = False

    def compile(self, grammar: Grammar) -> Verdict:
        self.asked.append(grammar.text)
        assert self.may_answer.wait(30)
        if self.fails:
            raise GrammarProcessFailed()
        return self.verdict

    def close(self) -> None:
        self.may_answer.set()


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def gate_of(compiler: Any, bytes_max: int = 1_000) -> GrammarGate:
    return GrammarGate(compiler, VerdictCache(bytes_max))


async def started(gate: GrammarGate, *wanted: tuple[str, str]) -> list["asyncio.Task[Verdict]"]:
    tasks = [asyncio.create_task(gate.verdict(tenant, Grammar("json", text))) for tenant, text in wanted]
    await asyncio.sleep(0)
    return tasks


def test_tenants_take_turns_however_many_grammars_one_sends() -> None:
    async def run() -> list[str]:
        compiler = Compiler()
        gate = gate_of(compiler)
        tasks = await started(gate, *[("greedy", f"g{number}") for number in range(5)], ("other", "o"))
        compiler.may_answer.set()
        await asyncio.gather(*tasks)
        gate.close()
        return compiler.asked

    assert asyncio.run(run()) == ["g0", "o", "g1", "g2", "g3", "g4"]


def test_a_tenant_with_too_many_waiting_is_told_to_wait_and_others_are_not() -> None:
    async def run() -> None:
        compiler = Compiler()
        gate = gate_of(compiler)
        tasks = await started(gate, *[("greedy", f"g{number}") for number in range(WAITING_MAX)])
        with pytest.raises(RateLimited) as refused:
            await gate.verdict("greedy", Grammar("json", "one more"))
        assert refused.value.retry_after_s is not None
        assert gate.counts.overloads == 1
        # One that waits already may be joined.
        tasks += await started(gate, ("other", "o"), ("greedy", "g3"))
        compiler.may_answer.set()
        assert all(verdict.allowed for verdict in await asyncio.gather(*tasks))
        assert len(compiler.asked) == WAITING_MAX + 1
        assert gate.counts.waiting == 0
        assert gate.counts.buckets[0] == sum(gate.counts.buckets) == WAITING_MAX + 1
        gate.close()

    asyncio.run(run())


@pytest.mark.parametrize("verdict", [Verdict(bytes=10), Verdict(error="no"), Verdict(too_complex=True)])
def test_a_verdict_is_asked_for_once_by_all_tenants(verdict: Verdict) -> None:
    async def run() -> None:
        compiler = Compiler(verdict)
        compiler.may_answer.set()
        gate = gate_of(compiler)
        for tenant in ("a", "b", "a"):
            assert await gate.verdict(tenant, Grammar("json", "same")) == verdict
        assert compiler.asked == ["same"]
        # The same text under another kind is another grammar.
        await gate.verdict("a", Grammar("regex", "same"))
        assert len(compiler.asked) == 2
        gate.close()

    asyncio.run(run())


def test_a_grammar_that_nobody_waits_for_is_not_compiled() -> None:
    async def run() -> list[str]:
        compiler = Compiler()
        gate = gate_of(compiler)
        tasks = await started(gate, ("a", "first"), ("a", "gone"), ("a", "last"))
        tasks[1].cancel()
        compiler.may_answer.set()
        await asyncio.gather(tasks[0], tasks[2])
        gate.close()
        return compiler.asked

    assert asyncio.run(run()) == ["first", "last"]


def test_without_a_verdict_the_client_may_try_again() -> None:
    async def run() -> None:
        compiler = Compiler()
        compiler.may_answer.set()
        gate = gate_of(compiler)
        compiler.fails = True
        with pytest.raises(EngineUnavailable):
            await gate.verdict("a", Grammar("json", "x"))
        compiler.fails = False
        assert (await gate.verdict("a", Grammar("json", "x"))).allowed
        gate.close()

    asyncio.run(run())


def test_the_cache_holds_a_bounded_number_of_bytes_and_of_refusals() -> None:
    clock = Clock()
    cache = VerdictCache(100, clock)
    for number in range(20):
        cache.put(b"%d" % number, Verdict(bytes=10))
        cache.get(b"0")
    assert [number for number in range(20) if cache.get(b"%d" % number)] == [0, *range(11, 20)]
    for number in range(REFUSED_MAX + 5):
        cache.put(b"r%d" % number, Verdict(error="no"))
    assert cache.get(b"r4") is None
    assert cache.get(b"r5") is not None


def test_too_complex_is_a_verdict_of_its_time_and_wrong_is_one_for_good() -> None:
    clock = Clock()
    cache = VerdictCache(100, clock)
    cache.put(b"slow", Verdict(too_complex=True))
    cache.put(b"wrong", Verdict(error="no"))
    clock.now_s = TOO_COMPLEX_FOR_S + 1
    assert cache.get(b"slow") is None
    assert cache.get(b"wrong") is not None
