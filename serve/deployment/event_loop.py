"""Sets the event loop of the service's processes. Ray calls `use_uvloop` as each of its workers starts."""

import asyncio

import uvloop


def use_uvloop() -> None:
    """Makes libuv's loop the default, as vLLM's own server does."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
