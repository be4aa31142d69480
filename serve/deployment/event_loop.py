"""Which event loop the processes of the service run: Ray calls this as each of its workers starts."""

import asyncio

import uvloop


def use_uvloop() -> None:
    """libuv's loop for user code, as vLLM's own server has it."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
