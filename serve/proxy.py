"""What Ray Serve's HTTP proxy does around every request of ours; the proxy imports it by name."""

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class OneRequestId:
    """Answers carry one request id, the ledger's.

    The proxy takes a client's x-request-id for its own and adds it to the answer beside the gateway's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            del MutableHeaders(scope=scope)["x-request-id"]

        async def send_one(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                ours = [value for value in headers.getlist("x-request-id") if value.startswith("req_")]
                if ours:
                    headers["x-request-id"] = ours[0]
            await send(message)

        await self._app(scope, receive, send_one)


def middlewares() -> list[Middleware]:
    return [Middleware(OneRequestId)]
