"""Records one request as its client saw it."""

from dataclasses import dataclass
from enum import StrEnum

from serve.billing.pricing.plans import Tokens


class Outcome(StrEnum):
    """Says how a request ended for its client."""

    COMPLETE = "complete"
    LEFT = "left"  # the client disconnected, for its scenario or because the run ended
    REFUSED = "refused"  # with an error code that the scenario provokes
    FAILED = "failed"


@dataclass(slots=True)
class RequestRecord:
    """Holds what the client sent, what came back, and how it ended.

    `row` is the report's row. `tokens` is the usage that the service reported; `pieces` counts the events
    with text that arrived. `status` is HTTP's, 0 if no answer began. `code` is OpenAI's error code, or names
    what broke the connection. `prompt_bytes` and `max_tokens` bound the usage of a request without an end.
    """

    row: str
    tenant: str
    model: str
    prompt_bytes: int
    max_tokens: int
    request_id: str | None = None
    outcome: Outcome = Outcome.FAILED
    status: int = 0
    code: str | None = None
    tokens: Tokens | None = None
    pieces: int = 0
    latency_ms: float = 0.0
    ttft_ms: float | None = None
