"""A reader gets every delta that a generation puts, in batches."""

import asyncio

import pytest

from serve.engine.protocol import Delta
from serve.errors import EngineFailed
from serve.inference.delta_buffer import DeltaBuffer


def deltas_of(*texts: str) -> list[Delta]:
    return [Delta(0, text, 1) for text in texts]


def test_what_gathers_while_the_reader_is_busy_comes_at_once() -> None:
    async def scenario() -> None:
        buffer = DeltaBuffer()
        buffer.put(deltas_of("a"))
        buffer.put(deltas_of("b", "c"))
        buffer.end(None)
        assert [batch async for batch in buffer] == [deltas_of("a", "b", "c")]

    asyncio.run(scenario())


def test_a_waiting_reader_gets_each_batch_as_it_comes() -> None:
    async def scenario() -> None:
        buffer = DeltaBuffer()
        reader = aiter(buffer)
        for text in ("a", "b"):
            next_batch = asyncio.ensure_future(anext(reader))
            await asyncio.sleep(0)
            assert not next_batch.done()
            buffer.put(deltas_of(text))
            assert await next_batch == deltas_of(text)

    asyncio.run(scenario())


def test_a_failure_is_raised_behind_what_was_there() -> None:
    async def scenario() -> None:
        buffer = DeltaBuffer()
        buffer.put(deltas_of("a"))
        buffer.end(EngineFailed())
        reader = aiter(buffer)
        assert await anext(reader) == deltas_of("a")
        with pytest.raises(EngineFailed):
            await anext(reader)

    asyncio.run(scenario())


def test_what_was_put_is_not_changed_by_what_comes_later() -> None:
    async def scenario() -> None:
        buffer, first = DeltaBuffer(), deltas_of("a")
        buffer.put(first)
        buffer.put(deltas_of("b"))
        assert first == deltas_of("a")

    asyncio.run(scenario())
