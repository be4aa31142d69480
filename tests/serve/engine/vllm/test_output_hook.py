"""Outputs read where vLLM puts them: in its own queue, through what its caller calls."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serve.engine.protocol import Delta, Event, Finished
from serve.engine.vllm.outputs import OutputHook, OutputParser


def queue(*outputs: Any) -> Any:
    """A queue of vLLM's as `Tap` uses it; what is in it has come before the tap."""
    waiting = SimpleNamespace(output=None)
    for output in outputs:
        waiting.output = output
    return waiting


def output(text: str, *, ends: bool = False) -> Any:
    one = SimpleNamespace(
        index=0,
        text=text,
        token_ids=[1],
        logprobs=None,
        finish_reason="stop" if ends else None,
        stop_reason=None,
    )
    return SimpleNamespace(outputs=[one], finished=ends, prompt_logprobs=None, num_cached_tokens=0)


def reader() -> OutputParser:
    return OutputParser(
        None, [[1, 2]], request=None, samples=1, parser=lambda: None, whole=False, logprobs=None
    )


def test_what_came_before_the_tap_comes_first_and_once() -> None:
    async def scenario() -> None:
        taken: list[list[Event]] = []
        tap, one = OutputHook(reader(), taken.append), queue(output("a"))
        tap.open(0, one)
        assert one.output is None
        one.put(output("b", ends=True))
        await asyncio.wait_for(tap.ended, 1)
        assert taken == [[Delta(0, "a", 1)], [Delta(0, "b", 1, "stop"), Finished(2, 0, 2, False)]]

    asyncio.run(scenario())


def test_what_vllm_raises_ends_the_wait_and_not_vllms_caller() -> None:
    async def scenario() -> None:
        tap, one = OutputHook(reader(), lambda _batch: None), queue()
        tap.open(0, one)
        one.put(RuntimeError("its core has died"))
        with pytest.raises(RuntimeError, match="its core has died"):
            await tap.ended

    asyncio.run(scenario())


def test_a_bug_in_who_takes_the_events_ends_this_request_alone() -> None:
    async def scenario() -> None:
        def broken(_batch: list[Event]) -> None:
            raise ZeroDivisionError

        tap, one = OutputHook(reader(), broken), queue()
        tap.open(0, one)
        one.put(output("a"))
        with pytest.raises(ZeroDivisionError):
            await tap.ended

    asyncio.run(scenario())


def test_what_comes_after_the_wait_was_given_up_is_counted_and_not_handed_on() -> None:
    async def scenario() -> None:
        taken: list[list[Event]] = []
        counting = reader()
        tap, one = OutputHook(counting, taken.append), queue()
        tap.open(0, one)
        tap.ended.cancel()
        one.put(output("a"))
        assert (taken, counting.counts) == ([], (2, 0, 1))

    asyncio.run(scenario())
