"""Checks what a replica remembers of requests, without an engine."""

import asyncio

import pytest

from serve.billing.metering.terms import RequestUsage
from serve.billing.pricing.plans import Tokens
from serve.engine.vllm import usage_log as usage_log_module
from serve.engine.vllm.usage_log import UsageLog
from serve.errors import EngineUnavailable

DONE = RequestUsage("r", "b", Tokens(10, 4, 7))


class Runner:
    """Runs requests until they are aborted."""

    def __init__(self) -> None:
        self.aborted = asyncio.Event()
        self.usage_log = UsageLog(self.abort)

    async def abort(self, _request_id: str) -> None:
        self.aborted.set()

    async def run(self, request_id: str) -> None:
        with self.usage_log.recording(request_id, lambda: DONE):
            await self.aborted.wait()


def test_a_request_that_runs_is_ended_and_its_last_count_told() -> None:
    async def scenario() -> RequestUsage | None:
        runner = Runner()
        running = asyncio.create_task(runner.run("a"))
        await asyncio.sleep(0)
        usage = await runner.usage_log.final_usage("a")
        await running
        assert await runner.usage_log.final_usage("a") == usage
        return usage

    assert asyncio.run(scenario()) == DONE


def test_a_request_that_was_ended_before_it_began_never_begins() -> None:
    async def scenario() -> None:
        runner = Runner()
        assert await runner.usage_log.final_usage("late") is None
        with pytest.raises(EngineUnavailable):
            await runner.run("late")

    asyncio.run(scenario())


def test_what_was_done_is_remembered_however_it_ended() -> None:
    async def scenario() -> RequestUsage | None:
        usage_log = Runner().usage_log
        with pytest.raises(ZeroDivisionError), usage_log.recording("a", lambda: DONE):
            raise ZeroDivisionError
        return await usage_log.final_usage("a")

    assert asyncio.run(scenario()) == DONE


def test_only_the_last_ones_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_log_module, "ENTRIES_MAX", 2)

    async def scenario() -> list[RequestUsage | None]:
        usage_log = Runner().usage_log
        for name in "abc":
            with usage_log.recording(name, lambda: DONE):
                pass
        return [await usage_log.final_usage(name) for name in "bca"]

    assert asyncio.run(scenario()) == [DONE, DONE, None]
