"""What may come in: how large headers are, how long a body may take, and bodies that are compressed.

Plain ASGI, inside `edge.py`, which bounds the bytes as they are sent; here the bound is on what they become.
"""

import asyncio
import zlib
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import render
from serve.errors import BodyTimeout, BodyTooLarge, HeadersTooLarge, InvalidRequest, UnsupportedEncoding

HEADER_BYTES_MAX = 16 * 1024
# zlib's window sizes that say: a gzip header is there (RFC 1952), or a zlib one (RFC 1950).
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


class Intake:
    """The largest body that a route takes must be complete in the time that it takes at `bytes_per_s_min`."""

    def __init__(
        self, app: ASGIApp, *, body_bytes_max: Callable[[Scope], int], bytes_per_s_min: float
    ) -> None:
        self._app = app
        self._body_bytes_max = body_bytes_max
        self._bytes_per_s_min = bytes_per_s_min

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES_MAX:
            await render(HeadersTooLarge(HEADER_BYTES_MAX), scope["path"])(scope, receive, send)
            return
        if encoding != "identity" and encoding not in _WINDOW_BITS:
            await render(UnsupportedEncoding(encoding[:40]), scope["path"])(scope, receive, send)
            return
        most = self._body_bytes_max(scope)
        incoming = _in_time(receive, most / self._bytes_per_s_min)
        if encoding != "identity":
            incoming = _inflated(incoming, _WINDOW_BITS[encoding], most)
            hidden = (b"content-encoding", b"content-length")
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in hidden]
        await self._app(scope, incoming, send)


def _in_time(receive: Receive, timeout_s: float) -> Receive:
    """`receive`, which raises BodyTimeout if the body is not complete in time. Then it may wait for ever."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    complete = False

    async def in_time() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline_s):
                message = await receive()
        except TimeoutError as error:
            raise BodyTimeout(timeout_s) from error
        complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return in_time


def _inflated(receive: Receive, window_bits: int, most: int) -> Receive:
    """`receive`, decompressed as it comes, and never more than `most` bytes of it.

    Raises BodyTooLarge, and InvalidRequest if the bytes are not what they are said to be.
    """
    inflater = zlib.decompressobj(window_bits)
    total = 0

    async def inflated() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] != "http.request":
            return message
        try:
            # One byte more than there may be: enough to know, and never a bomb's worth.
            body = inflater.decompress(message.get("body", b""), most - total + 1)
        except zlib.error as error:
            raise InvalidRequest("The body is not compressed as Content-Encoding says.") from error
        total += len(body)
        if total > most:
            raise BodyTooLarge(most)
        more = message.get("more_body", False)
        if not more and not inflater.eof:
            raise InvalidRequest("The compressed body ends too early.")
        return {"type": "http.request", "body": body, "more_body": more}

    return inflated
