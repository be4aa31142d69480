"""Collects a complete answer: joins the deltas of each choice."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from serve.engine.protocol import Delta, TokenLogprob, ToolCall


class CollectedAnswer:
    """Holds the choices of one request, as far as they are generated."""

    def __init__(self, choices: int) -> None:
        self.choices = [Choice(index) for index in range(choices)]

    def take(self, batch: Iterable[Delta]) -> None:
        for delta in batch:
            self.choices[delta.index].take(delta)


@dataclass(slots=True)
class Choice:
    """One choice of an answer. It grows with each delta. `parts` are the deltas, in their order."""

    index: int
    parts: list[Delta] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_sequence: str | None = None
    embedding: bytes = b""

    def take(self, delta: Delta) -> None:
        if delta.text or delta.reasoning or delta.tool_calls or delta.logprobs or delta.finish_reason:
            self.parts.append(delta)
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_sequence = delta.stop_sequence or self.stop_sequence
        self.embedding = delta.embedding or self.embedding
        for call_delta in delta.tool_calls:
            while len(self.tool_calls) <= call_delta.index:
                self.tool_calls.append(ToolCall(len(self.tool_calls)))
            call = self.tool_calls[call_delta.index]
            self.tool_calls[call_delta.index] = replace(
                call,
                id=call.id or call_delta.id,
                name=call.name or call_delta.name,
                arguments=call.arguments + call_delta.arguments,
            )
