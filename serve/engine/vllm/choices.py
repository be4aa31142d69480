"""Parses the outputs of one choice: reasoning, text, tool calls, and the log-probabilities of the text.

Streamed and whole answers take the same path, output by output, so that both are the same message wherever
the answer is cut. vLLM's own parsers of whole answers read a tool call that is cut as text.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replace_call
from typing import Any

from msgspec.structs import replace

from serve.engine.protocol import Delta, TokenLogprob, ToolCall
from serve.engine.vllm import upstream
from serve.engine.vllm.logprobs import MessageLogprobs

_DECODER = json.JSONDecoder()
Entries = Iterable[tuple[TokenLogprob, bool]]  # a token, and whether it has a text


class ChoiceParser:
    """Turns one choice's outputs into deltas.

    `parser` is one of vLLM's, or None where the text is the answer as it stands. With `collect` the choice
    comes in one piece at its end. `matches` leaves out the log-probabilities of tokens that add no text.
    """

    def __init__(
        self,
        index: int,
        parser: Any,
        request: Any,
        prompt: Sequence[int],
        *,
        collect: bool,
        matches: bool = False,
    ) -> None:
        self.begun = False
        self._index = index
        self._parser = parser
        self._request = request
        self._prompt = list(prompt)
        self._collected = _Collected(index) if collect else None
        self._has_called = False
        self._text = self._content = ""  # what a parser has read, and what of it is the message's text
        self._arguments: dict[int, str] = {}  # of each call
        self._has_reasoned = False
        self._logprobs = MessageLogprobs() if matches else None

    def take(
        self,
        text: str,
        ids: Sequence[int],
        reason: str | None,
        entries: Entries = (),
        stop_sequence: str | None = None,
    ) -> list[Delta]:
        """Returns the deltas of the next output. `reason` is why the choice ends with it."""
        self.begun = True
        if self._parser is None:
            delta = Delta(self._index, text, len(ids), reason)
        else:
            delta = self._parse(text, ids, reason, stop_sequence)
        logprobs = self._told(text, delta, entries)
        if logprobs or stop_sequence:
            delta = replace(delta, logprobs=logprobs, stop_sequence=stop_sequence)
        return self._deltas(delta)

    def echo(self, text: str, entries: Entries) -> list[Delta]:
        """Returns the deltas of the prompt, with which the choice begins. All its tokens are told."""
        self.begun = True
        delta = Delta(self._index, text, 0, logprobs=tuple(entry for entry, _ in entries))
        return self._deltas(delta)

    def _deltas(self, delta: Delta) -> list[Delta]:
        deltas = [delta] if self._collected is None else self._collected.take(delta)
        return [each for each in deltas if _carries_something(each)]

    def _parse(self, text: str, ids: Sequence[int], reason: str | None, stop_sequence: str | None) -> Delta:
        parsed = self._parser.parse_delta(
            text, list(ids), self._request, self._prompt, finished=reason is not None
        )
        calls: tuple[ToolCall, ...] = ()
        content = reasoning = ""
        if parsed is not None:
            calls = self._allowed(map(_tool_call, parsed.tool_calls))
            content, reasoning = _complete_characters(parsed.content), _complete_characters(parsed.reasoning)
        if reason is not None:
            calls = tuple(map(self._without_repetition, calls))
        self._text += text
        self._content += content
        self._has_reasoned = self._has_reasoned or bool(reasoning)
        for call in calls:
            self._arguments[call.index] = self._arguments.get(call.index, "") + call.arguments
        if reason == "stop" and stop_sequence is None and not self._arguments and not self._has_reasoned:
            rest, calls = self._withheld()
            content += rest
        self._has_called = self._has_called or bool(calls)
        return Delta(
            self._index, content, len(ids), self._reason(reason), reasoning=reasoning, tool_calls=calls
        )

    def _withheld(self) -> tuple[str, tuple[ToolCall, ...]]:
        """Returns what a parser has kept back of a complete text: calls that it cannot stream, or text.

        A text may end with what could have begun a call.
        """
        rest = self._text.removeprefix(self._content)
        if not rest or not self._text.startswith(self._content):
            return "", ()
        _, content, parsed = self._parser.parse(
            self._text, self._request, enable_auto_tools=True, model_output_token_ids=()
        )
        if not parsed:
            return rest, ()
        calls = self._allowed(
            ToolCall(
                number,
                call.id or upstream.make_tool_call_id(),
                _complete_characters(call.name),
                _complete_characters(call.arguments),
            )
            for number, call in enumerate(parsed)
        )
        return (content or "").removeprefix(self._content), calls

    def _without_repetition(self, call: ToolCall) -> ToolCall:
        """Drops what follows a call's complete arguments. Several parsers end with them once more."""
        before = self._arguments.get(call.index, "")
        try:
            _, end = _DECODER.raw_decode(before + call.arguments)
        except (ValueError, RecursionError):
            return call
        return replace_call(call, arguments=(before + call.arguments)[len(before) : end])

    def _told(self, text: str, delta: Delta, entries: Entries) -> tuple[TokenLogprob, ...]:
        if self._logprobs is None:
            return tuple(entry for entry, _ in entries)
        self._logprobs.add(text, entries)
        if delta.reasoning:
            self._logprobs.skip(delta.reasoning)
        told = [*self._logprobs.take(delta.text)] if delta.text else []
        if delta.finish_reason or delta.tool_calls:
            told += self._logprobs.cut()
        return tuple(told)

    def _allowed(self, calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
        several = self._request.parallel_tool_calls is not False
        return tuple(call for call in calls if several or call.index == 0)

    def _reason(self, reason: str | None) -> str | None:
        """Returns OpenAI's reason: tool_calls after calls that were not forced, else vLLM's."""
        forced = not isinstance(self._request.tool_choice, str | None)
        return "tool_calls" if reason == "stop" and self._has_called and not forced else reason


@dataclass(slots=True)
class _Part:
    """Gathers what belongs in one delta, whose order is reasoning, text, calls."""

    reasoning: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    calls: dict[int, ToolCall] = field(default_factory=dict)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def takes(self, delta: Delta) -> bool:
        return not (delta.reasoning and (self.text or self.calls)) and not (delta.text and self.calls)

    def add(self, delta: Delta) -> None:
        self.reasoning += [delta.reasoning] if delta.reasoning else []
        self.text += [delta.text] if delta.text else []
        self.logprobs += delta.logprobs
        for call in delta.tool_calls:
            begun = self.calls.get(call.index)
            self.calls[call.index] = (
                call if begun is None else replace_call(begun, arguments=begun.arguments + call.arguments)
            )


class _Collected:
    """Gathers a choice. It comes in one piece, unless text or reasoning follows a call."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._parts = [_Part()]

    def take(self, delta: Delta) -> list[Delta]:
        """Returns only the count, until the choice is complete."""
        if not self._parts[-1].takes(delta):
            self._parts.append(_Part())
        self._parts[-1].add(delta)
        if delta.finish_reason is None:
            return [Delta(self._index, "", delta.tokens)]
        *parts, last = map(self._delta, self._parts)
        return [
            *parts,
            replace(
                last,
                tokens=delta.tokens,
                finish_reason=delta.finish_reason,
                stop_sequence=delta.stop_sequence,
            ),
        ]

    def _delta(self, part: _Part) -> Delta:
        return Delta(
            self._index,
            "".join(part.text),
            0,
            reasoning="".join(part.reasoning),
            tool_calls=tuple(part.calls.values()),
            logprobs=tuple(part.logprobs),
        )


def _carries_something(delta: Delta) -> bool:
    return bool(delta.text or delta.tokens or delta.finish_reason or delta.tool_calls or delta.reasoning)


def _tool_call(call: Any) -> ToolCall:
    """Converts a piece of a call. The first one names the function, and has an id."""
    name = (_complete_characters(call.function.name) or None) if call.function else None
    return ToolCall(
        call.index,
        call.id or (upstream.make_tool_call_id() if name else None),
        name,
        _complete_characters(call.function.arguments) if call.function else "",
    )


def _complete_characters(text: str | None) -> str:
    """Replaces half characters ("\\ud83d"), which a parser of JSON may produce and no frame can carry."""
    if not text or text.isascii():
        return text or ""
    return text.encode(errors="replace").decode()
