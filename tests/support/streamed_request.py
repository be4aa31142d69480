"""One streamed chat request, read by a thread of its own."""

import contextlib
import json
import threading
import time
from typing import Any

import httpx

from tests.support.constants import TENANTS
from tests.support.live_service import LiveService


class StreamedRequest:
    """Is sent at once. Log-probabilities are asked for, because they name the tokens of a delta.

    Tokens that add no text are in none; the usage at the end counts all.
    """

    def __init__(self, service: LiveService, body: dict[str, Any], tenant: str = TENANTS[0]) -> None:
        self.status: int | None = None
        self.error_code: str | None = None
        self.request_id = ""
        self.tokens = 0
        self.finish_reason: str | None = None
        self.transport_error: str | None = None
        self._arrivals: list[tuple[float, int]] = []  # time.monotonic(), tokens until then
        self._url = f"{service.url}/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {service.keys[tenant]}"}
        self._body = body | {"stream": True, "logprobs": True, "stream_options": {"include_usage": True}}
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait_begun(self) -> None:
        assert self._begun.wait(60), "the stream did not begin in time"

    def wait_ended(self, timeout_s: float = 120) -> None:
        self._thread.join(timeout_s)
        assert self.ended, "the stream did not end in time"

    def tokens_at(self, moment_s: float) -> int:
        """The tokens that had come by `moment_s` (time.monotonic())."""
        return max((tokens for at_s, tokens in self._arrivals if at_s <= moment_s), default=0)

    def _read(self) -> None:
        try:
            with httpx.stream(
                "POST", self._url, json=self._body, headers=self._headers, timeout=120
            ) as response:
                self.status = response.status_code
                self.request_id = response.headers.get("x-request-id", "")
                if response.status_code != 200:
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        self.error_code = json.loads(response.read())["error"]["code"]
                    return
                for line in response.iter_lines():
                    if line and line != "data: [DONE]":
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError as error:
            self.transport_error = type(error).__name__

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error_code = event["error"]["code"]
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            self.finish_reason = choice["finish_reason"]
            self.tokens += len((choice.get("logprobs") or {}).get("content") or ())
            self._arrivals.append((time.monotonic(), self.tokens))
            if self.tokens:
                self._begun.set()
