"""Checks that outputs are parsed within vLLM's own call of its queue's `put`."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serve.engine.protocol import Delta, Event, Finished
from serve.engine.vllm.outputs import OutputHook, OutputParser


def queue(*outputs: Any) -> Any:
    """A queue of vLLM's as OutputHook uses it. It holds the outputs that came before the hook."""
    waiting = SimpleNamespace(output=None)
    for output in outputs:
        waiting.output = output
    return waiting


def output(text: str, *, ends: bool = False) -> Any:
    completion = SimpleNamespace(
        index=0,
        text=text,
        token_ids=[1],
        logprobs=None,
        finish_reason="stop" if ends else None,
        stop_reason=None,
    )
    return SimpleNamespace(outputs=[completion], finished=ends, prompt_logprobs=None, num_cached_tokens=0)


def output_parser() -> OutputParser:
    return OutputParser(
        None, [[1, 2]], request=None, samples=1, parser=lambda: None, collect=False, logprobs=None
    )


def test_what_came_before_the_hook_comes_first_and_once() -> None:
    async def scenario() -> None:
        taken: list[list[Event]] = []
        hook, vllm_queue = OutputHook(output_parser(), taken.append), queue(output("a"))
        hook.open(0, vllm_queue)
        assert vllm_queue.output is None
        vllm_queue.put(output("b", ends=True))
        await asyncio.wait_for(hook.ended, 1)
        assert taken == [[Delta(0, "a", 1)], [Delta(0, "b", 1, "stop"), Finished(2, 0, 2, False)]]

    asyncio.run(scenario())


def test_what_vllm_raises_ends_the_wait_and_not_vllms_caller() -> None:
    async def scenario() -> None:
        hook, vllm_queue = OutputHook(output_parser(), lambda _batch: None), queue()
        hook.open(0, vllm_queue)
        vllm_queue.put(RuntimeError("its core has died"))
        with pytest.raises(RuntimeError, match="its core has died"):
            await hook.ended

    asyncio.run(scenario())


def test_a_bug_in_who_takes_the_events_ends_this_request_alone() -> None:
    async def scenario() -> None:
        def broken(_batch: list[Event]) -> None:
            raise ZeroDivisionError

        hook, vllm_queue = OutputHook(output_parser(), broken), queue()
        hook.open(0, vllm_queue)
        vllm_queue.put(output("a"))
        with pytest.raises(ZeroDivisionError):
            await hook.ended

    asyncio.run(scenario())


def test_what_comes_after_the_wait_was_given_up_is_counted_and_not_handed_on() -> None:
    async def scenario() -> None:
        taken: list[list[Event]] = []
        counting = output_parser()
        hook, vllm_queue = OutputHook(counting, taken.append), queue()
        hook.open(0, vllm_queue)
        hook.ended.cancel()
        vllm_queue.put(output("a"))
        assert (taken, counting.counts) == ([], (2, 0, 1))

    asyncio.run(scenario())
