"""Reads a request's body and makes something of it, away from the event loop if it is large."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from serve.formats.body_budget import THREAD_BYTES_MIN

T = TypeVar("T")


async def read_body(request: Request, read: Callable[[bytes], T]) -> T:
    """`read` of the body. Raises what it raises."""
    body = await request.body()
    return read(body) if len(body) < THREAD_BYTES_MIN else await asyncio.to_thread(read, body)
