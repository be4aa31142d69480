"""What a client asked for, and who keeps what comes of it.

An answer as a whole: the deltas of each choice, put together again.

What of an answer waits for its reader: put by whoever generates, read once, as fast as the reader can.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol

import sqlalchemy as sa

from serve.billing.pricing.plans import Tokens
from serve.engine.protocol import Delta, Prompt, Sampling, Texts, TokenLogprob, Toolbox, ToolCall


class DeltaBuffer:
    """Deltas gather while the reader is busy. Every token passes here, and a queue would cost more."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._over = False
        self._failure: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, deltas: list[Delta]) -> None:
        self._deltas = self._deltas + deltas if self._deltas else deltas
        self._wake()

    def end(self, failure: Exception | None) -> None:
        """Nothing more comes; once the reader has what there is, `failure` is raised, if there is one."""
        self._over, self._failure = True, failure
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        loop = asyncio.get_running_loop()
        while True:
            if self._deltas:
                deltas, self._deltas = self._deltas, []
                yield deltas
            elif self._over:
                if self._failure is not None:
                    raise self._failure
                return
            else:
                self._reader = loop.create_future()
                await self._reader


@dataclass(slots=True)
class Choice:
    """One of the answers to a request. It grows with each delta."""

    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_sequence: str | None = None

    def take(self, delta: Delta) -> None:
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_sequence = delta.stop_sequence or self.stop_sequence
        for piece in delta.tool_calls:
            while len(self.tool_calls) <= piece.index:
                self.tool_calls.append(ToolCall(len(self.tool_calls)))
            known = self.tool_calls[piece.index]
            self.tool_calls[piece.index] = replace(
                known,
                id=known.id or piece.id,
                name=known.name or piece.name,
                arguments=known.arguments + piece.arguments,
            )


class CollectedAnswer:
    """The choices of a request, as far as they have come."""

    def __init__(self, choices: int) -> None:
        self.choices = [Choice(index) for index in range(choices)]

    def take(self, batch: Iterable[Delta]) -> None:
        for delta in batch:
            self.choices[delta.index].take(delta)


class CommitHook(Protocol):
    """Stores a request's outcome in the very transactions that open and close its hold."""

    def on_hold(self, connection: sa.Connection, at: datetime) -> None:
        """Runs with the hold. An exception refuses the request, and nothing is held."""

    def on_settle(self, connection: sa.Connection, result: "GenerationResult") -> None:
        """Runs with the settlement: `result.choices` are complete, and paid for."""

    def on_void(self, connection: sa.Connection) -> None:
        """Runs with the void, and with the settlement of an answer that was cut short or not stored."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """Holds what a client asked for, validated and bounded, in the gateway's own terms.

    collect: gather the choices into `GenerationResult.choices`, which a `commit_hook` needs.
    survives_disconnect: go on when the client leaves, because it will come back for the answer.
    tier: "default" or "batch", which of the plan's prices apply.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: Sampling
    length_param: str
    toolbox: Toolbox | None = None
    reasoning_effort: str | None = None
    collect: bool = False
    commit_hook: CommitHook | None = None
    survives_disconnect: bool = False
    tier: str = "default"

    @property
    def choices(self) -> int:
        prompts = len(self.prompt.prompts) if isinstance(self.prompt, Texts) else 1
        return prompts * self.sampling.n


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Holds what a generation has come to: plain values for formats and commit hooks.

    `model` is the name that the client gave. `choices` are empty unless the request collects them.
    """

    request: InferenceRequest
    model: str
    created_at: datetime
    tokens: Tokens
    choices: Sequence[Choice] = ()
