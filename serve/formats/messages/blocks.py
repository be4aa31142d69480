"""An answer's content as it grows: each delta changes blocks, and makes the events that tell of it.

docs.anthropic.com/en/docs/build-with-claude/streaming: a block starts, grows and stops before the next one
starts. An answer that comes whole goes the same way, as one delta whose events nobody is sent.
"""

import json
from collections.abc import Iterator
from typing import Any

from serve.engine.protocol import Delta, ToolCall
from serve.errors import EngineFailed
from serve.inference.request import Choice

Json = dict[str, Any]


class Blocks:
    """The content of one answer. Reasoning is not part of it: nobody could ask for it."""

    def __init__(self, message_id: str) -> None:
        self.content: list[Json] = []
        self._message_id = message_id
        self._open: int | str | None = None  # the call's index, or "text"
        self._arguments = ""
        self._finish_reason: str | None = None
        self._stop_sequence: str | None = None

    def take(self, delta: Delta) -> Iterator[Json]:
        """Raises EngineFailed if a call goes on after the next one has begun: no event could say so."""
        self._finish_reason = delta.finish_reason or self._finish_reason
        self._stop_sequence = delta.stop_sequence or self._stop_sequence
        if delta.text:
            if self._open != "text":
                yield from self._start("text", {"type": "text", "text": ""})
            self.content[-1]["text"] += delta.text
            yield self._grow({"type": "text_delta", "text": delta.text})
        for piece in delta.tool_calls:
            yield from self._call(piece)

    def whole(self, choice: Choice) -> None:
        """Take an answer that is complete, and end."""
        calls = tuple(choice.tool_calls)
        delta = Delta(
            choice.index,
            choice.text,
            0,
            choice.finish_reason,
            tool_calls=calls,
            stop_sequence=choice.stop_sequence,
        )
        for _ in (*self.take(delta), *self.stop()):
            pass

    def stop(self) -> Iterator[Json]:
        """Stop the open block, if there is one."""
        if self._open is None:
            return
        if self._open != "text":
            self.content[-1]["input"] = _input(self._arguments)
        self._open = None
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    @property
    def end(self) -> Json:
        """Why the message ended, as its last fields say it."""
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

    def _call(self, piece: ToolCall) -> Iterator[Json]:
        if piece.index != self._open:
            if piece.name is None:
                raise EngineFailed()
            used = piece.id or f"toolu_{self._message_id.removeprefix('msg_')}{piece.index:02x}"
            block = {"type": "tool_use", "id": used, "name": piece.name, "input": {}}
            yield from self._start(piece.index, block)
            self._arguments = ""
        if piece.arguments:
            self._arguments += piece.arguments
            yield self._grow({"type": "input_json_delta", "partial_json": piece.arguments})

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


def _input(arguments: str) -> Json:
    """The call's arguments; what is no object (it was cut short) goes where Anthropic's own clients put it.

    docs.anthropic.com/en/docs/agents-and-tools/tool-use/fine-grained-tool-streaming, "invalid JSON".
    """
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}
