"""Builds a message's content blocks from deltas, and the stream events of each change.

docs.anthropic.com/en/docs/build-with-claude/streaming: a block starts, grows and stops before the next one
starts. A complete answer takes the same path, and its events are discarded; so both agree.
"""

from collections.abc import Iterator
from typing import Any

from serve.engine.protocol import Delta, ToolCall
from serve.errors import EngineFailed
from serve.formats.messages.arguments import input_of
from serve.inference.answer import Choice

Json = dict[str, Any]


class Blocks:
    """Holds the content of one answer. Reasoning is left out: no request of ours can ask for it."""

    def __init__(self, message_id: str) -> None:
        self.content: list[Json] = []
        self._message_id = message_id
        self._open: int | str | None = None  # the open block: a tool call's index, or "text"
        self._arguments = ""
        self._finish_reason: str | None = None
        self._stop_sequence: str | None = None

    def take(self, delta: Delta) -> Iterator[Json]:
        """Add a delta, and yield its events.

        Raises EngineFailed if a call goes on after the next one has begun: no event can express that.
        """
        self._finish_reason = delta.finish_reason or self._finish_reason
        self._stop_sequence = delta.stop_sequence or self._stop_sequence
        if delta.text:
            if self._open != "text":
                yield from self._start("text", {"type": "text", "text": ""})
            self.content[-1]["text"] += delta.text
            yield self._grow({"type": "text_delta", "text": delta.text})
        for call in delta.tool_calls:
            yield from self._take_call(call)

    def take_complete(self, choice: Choice) -> None:
        """Add a complete answer, and stop."""
        for part in choice.parts:
            for _ in self.take(part):
                pass
        for _ in self.stop():
            pass

    def stop(self) -> Iterator[Json]:
        """Stop the open block, if there is one."""
        if self._open is None:
            return
        if self._open != "text":
            self.content[-1]["input"] = input_of(self._arguments)
        self._open = None
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    @property
    def ending(self) -> Json:
        """The message's fields about why it ended."""
        reason = self._stop_reason()
        return {
            "stop_reason": reason,
            "stop_sequence": self._stop_sequence if reason == "stop_sequence" else None,
        }

    def _stop_reason(self) -> str:
        if self._finish_reason == "length":
            return "max_tokens"
        if self._stop_sequence is not None:
            return "stop_sequence"
        return "tool_use" if any(block["type"] == "tool_use" for block in self.content) else "end_turn"

    def _take_call(self, call: ToolCall) -> Iterator[Json]:
        if call.index != self._open:
            if call.name is None:
                raise EngineFailed()
            call_id = call.id or f"toolu_{self._message_id.removeprefix('msg_')}{call.index:02x}"
            block = {"type": "tool_use", "id": call_id, "name": call.name, "input": {}}
            yield from self._start(call.index, block)
            self._arguments = ""
        if call.arguments:
            self._arguments += call.arguments
            yield self._grow({"type": "input_json_delta", "partial_json": call.arguments})

    def _start(self, key: int | str, block: Json) -> Iterator[Json]:
        yield from self.stop()
        self._open = key
        self.content.append(block)
        yield {
            "type": "content_block_start",
            "index": len(self.content) - 1,
            "content_block": dict(block),
        }

    def _grow(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}
