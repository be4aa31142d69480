"""An answer as a whole: the deltas of each choice, put together again."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from serve.engine.base import Delta, TokenLogprob, ToolCall


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


class Answer:
    """The choices of a request, as far as they have come."""

    def __init__(self, choices: int) -> None:
        self.choices = [Choice(index) for index in range(choices)]

    def take(self, batch: Iterable[Delta]) -> None:
        for delta in batch:
            self.choices[delta.index].take(delta)
