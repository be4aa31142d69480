"""One request as its client saw it."""

from dataclasses import dataclass
from enum import StrEnum

from serve.billing.pricing.plans import Tokens


class Outcome(StrEnum):
    COMPLETE = "complete"
    LEFT = "left"  # the client went away, as its scenario wanted or because the run ended
    REFUSED = "refused"  # with a code that the scenario means to provoke
    FAILED = "failed"


@dataclass(slots=True)
class Exchange:
    """`tokens` is what the service said was used; `pieces` are the events with text that arrived.

    `status` is HTTP's, 0 if no answer began; `code` is OpenAI's error code, or what broke the connection.
    `prompt_bytes` and `max_tokens` bound what a request can have used whose end the client did not see.
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
