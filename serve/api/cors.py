"""Lets web pages of allowed origins call the API (fetch.spec.whatwg.org, section CORS protocol).

A page sends its key itself, in a header: cookies and other credentials of the browser are never allowed.
"""

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

ANY_PORT = ":*"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# What a page may read of an answer, besides its body.
EXPOSED = (
    "idempotency-replayed",
    "openai-processing-ms",
    "request-id",
    "retry-after",
    "x-bespoke-ignored-tools",
    "x-bespoke-max-tokens",
    "x-original-request-id",
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
    "x-request-id",
    "x-should-retry",
)


class BrowserMiddleware(CORSMiddleware):
    """Answers preflights, and adds CORS headers to answers and errors for pages of `origins`.

    Starlette's wraps each chunk of every stream; here a request without an Origin, as all but browsers send
    it, goes past it. origins: such as `https://app.example`, `http://localhost:*` for any port, or `*`.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=["*"] if "*" in origins else [],
            allow_origin_regex="|".join(map(_pattern, origins)),
            allow_methods=METHODS,
            # Clients' libraries make up headers as they like: x-stainless-…, anthropic-…
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and any(name == b"origin" for name, _ in scope["headers"]):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _pattern(origin: str) -> str:
    if origin.endswith(ANY_PORT):
        return re.escape(origin.removesuffix(ANY_PORT)) + r"(:\d{1,5})?"
    return re.escape(origin)
