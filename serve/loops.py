"""Which event loop the processes of the service run: Ray calls this as each of its workers starts."""

import asyncio

import uvloop


def use_uvloop() -> None:
    """libuv's loop for user code, as uvicorn and vLLM's own server have it: half the CPU per socket write."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
