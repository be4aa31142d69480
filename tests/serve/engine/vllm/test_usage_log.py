"""What a replica remembers of requests, without an engine."""

import asyncio

import pytest

from serve.engine.protocol import Final
from serve.engine.vllm import usage_log as finals_module
from serve.engine.vllm.usage_log import Finals
from serve.errors import EngineUnavailable

DONE = Final("r", "b", 10, 4, 7)


class Runner:
    """Runs requests until they are aborted."""

    def __init__(self) -> None:
        self.aborted = asyncio.Event()
        self.finals = Finals(self.abort)

    async def abort(self, _request_id: str) -> None:
        self.aborted.set()

    async def run(self, request_id: str) -> None:
        with self.finals.remembering(request_id, lambda: DONE):
            await self.aborted.wait()


def test_a_request_that_runs_is_ended_and_its_last_count_told() -> None:
    async def scenario() -> Final | None:
        runner = Runner()
        running = asyncio.create_task(runner.run("a"))
        await asyncio.sleep(0)
        told = await runner.finals.of("a")
        await running
        assert await runner.finals.of("a") == told
        return told

    assert asyncio.run(scenario()) == DONE


def test_a_request_that_was_ended_before_it_began_never_begins() -> None:
    async def scenario() -> None:
        runner = Runner()
        assert await runner.finals.of("late") is None
        with pytest.raises(EngineUnavailable):
            await runner.run("late")

    asyncio.run(scenario())


def test_what_was_done_is_remembered_however_it_ended() -> None:
    async def scenario() -> Final | None:
        finals = Runner().finals
        with pytest.raises(ZeroDivisionError), finals.remembering("a", lambda: DONE):
            raise ZeroDivisionError
        return await finals.of("a")

    assert asyncio.run(scenario()) == DONE


def test_only_the_last_ones_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finals_module, "KEPT_MAX", 2)

    async def scenario() -> list[Final | None]:
        finals = Runner().finals
        for name in "abc":
            with finals.remembering(name, lambda: DONE):
                pass
        return [await finals.of(name) for name in "bca"]

    assert asyncio.run(scenario()) == [DONE, DONE, None]
