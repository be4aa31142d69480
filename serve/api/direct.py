"""The routes that carry the load: their endpoint is called without FastAPI's work for each request."""

from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from serve.api.context import caller, context


class Direct(APIRoute):
    """A route whose endpoint is `(request, who: Inference, ctx: Ctx) -> Response`, documented as any other.

    FastAPI would resolve two dependencies and open four exit stacks for it: a tenth of what a request costs
    the gateway. What is raised goes to the application's handlers, as everywhere.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        response = await self.endpoint(request, await caller(request, "inference"), context(request))
        await response(scope, receive, send)
