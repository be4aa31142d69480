"""Builds a response's output items from deltas, and the stream events of each change.

A complete answer takes the same path, and its events are discarded; so both agree.
Events: platform.openai.com/docs/api-reference/responses-streaming; `events.py` numbers them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from serve.engine.protocol import Delta, ToolCall
from serve.formats.logprobs import token_logprob
from serve.formats.responses.items import Ids, call_item, custom_call_item
from serve.formats.responses.tools import CustomTool, Offer, custom_input
from serve.inference.answer import Choice

Json = dict[str, Any]


class Output:
    """Holds the items of one answer. A text ends when another item begins; calls end with the answer.

    offers: the tools by the names that the model knows. A custom tool's input comes at once, at the end: it
    is a part of the function's arguments.
    """

    def __init__(self, ids: Ids, offers: Mapping[str, Offer]) -> None:
        self.items: list[Json] = []
        self.finish_reason: str | None = None
        self._ids = ids
        self._open_index: int | None = None  # of the open message or reasoning in `items`
        self._offers = offers
        self._calls: dict[int, int] = {}  # tool call index -> index in `items`
        self._custom: dict[int, str] = {}  # index in `items` -> the arguments of a custom tool's call
        self._logprobs: list[Json] = []  # of tokens that have added no text yet

    def take(self, delta: Delta) -> Iterator[Json]:
        """Add a delta, and yield its events."""
        self.finish_reason = delta.finish_reason or self.finish_reason
        if delta.reasoning:
            yield from self._open("reasoning")
            yield from self._add(delta.reasoning)
        self._logprobs += map(token_logprob, delta.logprobs)
        if delta.text:
            yield from self._open("message")
            yield from self._add(delta.text)
        for call in delta.tool_calls:
            yield from self._take_call(call)

    def take_complete(self, choice: Choice) -> None:
        """Add a complete answer, and end."""
        for part in choice.parts:
            for _ in self.take(part):
                pass
        for _ in self.end():
            pass

    @property
    def complete(self) -> bool:
        return self.finish_reason != "length"

    def end(self) -> Iterator[Json]:
        """Close the open items, and yield their events. An empty answer is an empty message."""
        if not any(item["type"] != "reasoning" for item in self.items):
            yield from self._open("message")
        last = len(self.items) - 1
        status = "completed" if self.complete else "incomplete"
        yield from self._close(status if self._open_index == last else "completed")
        for index in self._calls.values():
            item = self.items[index]
            item["status"] = status if index == last else "completed"
            position = {"item_id": item["id"], "output_index": index}
            if index in self._custom:
                yield from self._end_custom(index, position)
            else:
                done = {"type": "response.function_call_arguments.done", "name": item["name"]}
                yield done | position | {"arguments": item["arguments"]}
            yield _done(index, item)

    def _end_custom(self, index: int, position: Json) -> Iterator[Json]:
        text = self.items[index]["input"] = custom_input(self._custom[index])
        yield {"type": "response.custom_tool_call_input.delta"} | position | {"delta": text}
        yield {"type": "response.custom_tool_call_input.done"} | position | {"input": text}

    def abandon(self) -> None:
        """Mark the open items as incomplete, because the answer broke off."""
        for item in self.items:
            if item["status"] == "in_progress":
                item["status"] = "incomplete"

    def _open(self, kind: str) -> Iterator[Json]:
        """Open an item of this kind ("message" or "reasoning"), unless it is open already."""
        if self._open_index is not None:
            if self.items[self._open_index]["type"] == kind:
                return
            yield from self._close("completed")
        item: Json = {"type": kind, "id": self._ids.next("rs" if kind == "reasoning" else "msg")}
        fields: Json = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
        item |= fields | {"status": "in_progress", "content": []}
        self._open_index = len(self.items)
        self.items.append(item)
        yield _added(self._open_index, item)
        part: Json = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        yield {"type": "response.content_part.added"} | self._position() | {"part": dict(part)}

    def _add(self, text: str) -> Iterator[Json]:
        index = self._open_index
        assert index is not None
        item = self.items[index]
        part = item["content"][0]
        part["text"] += text
        if item["type"] == "reasoning":
            yield {"type": "response.reasoning_text.delta"} | self._position() | {"delta": text}
            return
        logprobs = self._flush_logprobs(part)
        yield (
            {"type": "response.output_text.delta"} | self._position() | {"delta": text, "logprobs": logprobs}
        )

    def _flush_logprobs(self, part: Json) -> list[Json]:
        """Move the waiting log-probabilities to the part, and return them."""
        logprobs, self._logprobs = self._logprobs, []
        part["logprobs"] = part["logprobs"] + logprobs
        return logprobs

    def _close(self, status: str) -> Iterator[Json]:
        """End the open message or reasoning, if there is one."""
        if self._open_index is None:
            return
        index, item = self._open_index, self.items[self._open_index]
        part, position = item["content"][0], self._position()
        if item["type"] == "reasoning":
            yield {"type": "response.reasoning_text.done"} | position | {"text": part["text"]}
        else:
            self._flush_logprobs(part)
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.output_text.done"} | position | text
        yield {"type": "response.content_part.done"} | position | {"part": dict(part)}
        item["status"] = status
        self._open_index = None
        yield _done(index, item)

    def _take_call(self, call: ToolCall) -> Iterator[Json]:
        index = self._calls.get(call.index)
        if index is None:
            yield from self._close("completed")
            index = self._calls[call.index] = len(self.items)
            self.items.append(self._begun(call, index) | {"status": "in_progress"})
            yield _added(index, self.items[index])
        if index in self._custom:
            self._custom[index] += call.arguments
        elif call.arguments:
            item = self.items[index]
            item["arguments"] += call.arguments
            position = {"item_id": item["id"], "output_index": index}
            yield {"type": "response.function_call_arguments.delta"} | position | {"delta": call.arguments}

    def _begun(self, call: ToolCall, index: int) -> Json:
        name = call.name or ""
        offer = self._offers.get(name)
        if offer is not None:
            name = offer.tool.name
        namespace = offer.namespace if offer else None
        is_custom = offer is not None and isinstance(offer.tool, CustomTool)
        prefix = "ctc" if is_custom else "fc"
        item_id = self._ids.next(prefix)
        call_id = call.id or item_id.replace(f"{prefix}_", "call_")
        if is_custom:
            self._custom[index] = ""
            return custom_call_item(item_id, call_id, name, "", namespace)
        return call_item(item_id, call_id, name, "", namespace)

    def _position(self) -> Json:
        index = self._open_index
        assert index is not None
        return {"item_id": self.items[index]["id"], "output_index": index, "content_index": 0}


def _added(index: int, item: Json) -> Json:
    content: Json = {"content": []} if "content" in item else {}
    return {"type": "response.output_item.added", "output_index": index, "item": item | content}


def _done(index: int, item: Json) -> Json:
    return {"type": "response.output_item.done", "output_index": index, "item": item}
