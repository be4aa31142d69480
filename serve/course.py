"""The course of one generation, as logs and traces tell it: its steps, and how it ended."""

import logging
from collections.abc import Mapping, Sequence

from serve.billing.usage import UsageEvent

log = logging.getLogger(__name__)


class Course:
    """Tells the log of the end. `serve.tracing` has one that makes spans of the steps as well."""

    def __init__(self, model: str, base: str) -> None:
        self.headers: Mapping[str, str] | None = None
        self._facts: dict[str, object] = {"model": model, "base": base}

    def step(self, name: str, **attributes: str | int) -> None:
        """The step before it has ended, and `name` begins."""

    def settled(self, event: UsageEvent, reasons: Sequence[str]) -> None:
        """What is billed. `reasons` has one for each choice that came to its end."""
        self._facts |= {
            "outcome": event.status.value,
            "adapter": event.adapter_version,
            "finish_reason": event.finish_reason,
            "prompt_tokens": event.tokens.prompt,
            "cached_tokens": event.tokens.cached,
            "completion_tokens": event.tokens.completion,
            "ttft_ms": event.ttft_ms,
            "duration_ms": event.latency_ms,
            "attempt": event.attempt,
        }

    def voided(self, reason: str, attempt: int) -> None:
        """Nothing is billed."""
        self._facts |= {"outcome": "void", "finish_reason": reason, "attempt": attempt}

    def end(self) -> None:
        """The hold is closed."""
        log.info("generation %s", self._facts.get("outcome"), extra=self._facts)
