"""Defines one inference request, its result, and the hook that stores the result with the bill."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import sqlalchemy as sa

from serve.billing.pricing.plans import Tokens
from serve.engine.protocol import Pooling, Prompt, Sampling, Texts, Toolbox
from serve.inference.answer import Choice


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """Holds a client's request, validated and bounded, in the gateway's own terms.

    completion_tokens_asked: the client's own bound, before ours; None if it names none.
    collect: gather the choices into `GenerationResult.choices`, which a `commit_hook` needs.
    survives_disconnect: go on when the client leaves, because it will come back for the answer.
    tier: "default" or "batch", which of the plan's prices apply.
    pooling: make a vector of each text of the prompt, and generate nothing.
    base64: write the vectors as text, as OpenAI's clients ask for them.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: Sampling
    toolbox: Toolbox | None = None
    reasoning_effort: str | None = None
    collect: bool = False
    commit_hook: "CommitHook | None" = None
    survives_disconnect: bool = False
    tier: str = "default"
    completion_tokens_asked: int | None = None
    pooling: Pooling | None = None
    base64: bool = False

    @property
    def choices(self) -> int:
        """The number of choices in the answer, over all prompts and samples."""
        prompts = len(self.prompt.prompts) if isinstance(self.prompt, Texts) else 1
        return prompts * self.sampling.n


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Holds a generation's outcome so far, as plain values for response formats and commit hooks.

    `model` is the name that the client gave. `choices` are empty unless the request collects them.
    """

    request: InferenceRequest
    model: str
    created_at: datetime
    tokens: Tokens
    choices: Sequence[Choice] = ()


class CommitHook(Protocol):
    """Stores a request's outcome in the same transactions that open and close its hold.

    So a bill and what is stored with it are there together, or neither is.
    """

    def on_hold(self, connection: sa.Connection, at: datetime) -> None:
        """Runs with the hold. An exception refuses the request, and nothing is held."""

    def on_settle(self, connection: sa.Connection, result: GenerationResult) -> None:
        """Runs with the settlement of a complete answer; `result.choices` hold it."""

    def on_void(self, connection: sa.Connection) -> None:
        """Runs with the void, and with the settlement of an answer that was cut short or not stored."""
