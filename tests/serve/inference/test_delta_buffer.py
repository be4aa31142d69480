"""What a generation puts for its reader, and what the reader gets."""

import asyncio

import pytest

from serve.engine.protocol import Delta
from serve.errors import EngineFailed
from serve.inference.delta_buffer import DeltaBuffer


def said(*texts: str) -> list[Delta]:
    return [Delta(0, text, 1) for text in texts]


def test_what_gathers_while_the_reader_is_busy_comes_at_once() -> None:
    async def scenario() -> None:
        delivery = DeltaBuffer()
        delivery.put(said("a"))
        delivery.put(said("b", "c"))
        delivery.end(None)
        assert [batch async for batch in delivery] == [said("a", "b", "c")]

    asyncio.run(scenario())


def test_a_waiting_reader_gets_each_batch_as_it_comes() -> None:
    async def scenario() -> None:
        delivery = DeltaBuffer()
        reading = aiter(delivery)
        for text in ("a", "b"):
            coming = asyncio.ensure_future(anext(reading))
            await asyncio.sleep(0)
            assert not coming.done()
            delivery.put(said(text))
            assert await coming == said(text)

    asyncio.run(scenario())


def test_a_failure_is_raised_behind_what_was_there() -> None:
    async def scenario() -> None:
        delivery = DeltaBuffer()
        delivery.put(said("a"))
        delivery.end(EngineFailed())
        reading = aiter(delivery)
        assert await anext(reading) == said("a")
        with pytest.raises(EngineFailed):
            await anext(reading)

    asyncio.run(scenario())


def test_what_was_put_is_not_changed_by_what_comes_later() -> None:
    async def scenario() -> None:
        delivery, first = DeltaBuffer(), said("a")
        delivery.put(first)
        delivery.put(said("b"))
        assert first == said("a")

    asyncio.run(scenario())
