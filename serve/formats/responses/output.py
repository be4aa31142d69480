"""A response's output as it grows: each delta changes items, and makes the events that tell of it.

An answer that comes whole goes the same way, as one delta whose events nobody is sent: so both agree.
Events: platform.openai.com/docs/api-reference/responses-streaming; `events.py` numbers them.
"""

from collections.abc import Iterator
from typing import Any

from serve.engine.protocol import Delta, TokenLogprob, ToolCall
from serve.formats.responses.items import Ids, call_item
from serve.inference.request import Choice

Json = dict[str, Any]


class Output:
    """The items of one answer. Texts end where another item begins, calls with the answer."""

    def __init__(self, ids: Ids) -> None:
        self.items: list[Json] = []
        self.finish_reason: str | None = None
        self._ids = ids
        self._texts: int | None = None  # the index of the text or reasoning that is open
        self._calls: dict[int, int] = {}
        self._logprobs: list[Json] = []  # of tokens that have added no text yet

    def take(self, delta: Delta) -> Iterator[Json]:
        self.finish_reason = delta.finish_reason or self.finish_reason
        if delta.reasoning:
            yield from self._open("reasoning")
            yield from self._add(delta.reasoning)
        if delta.text or not (delta.reasoning or delta.tool_calls):
            self._logprobs += [_logprob(one) for one in delta.logprobs]
        if delta.text:
            yield from self._open("message")
            yield from self._add(delta.text)
        for piece in delta.tool_calls:
            yield from self._call(piece)

    def whole(self, choice: Choice) -> None:
        """Take an answer that is complete, and end."""
        delta = Delta(
            choice.index,
            choice.text,
            0,
            choice.finish_reason,
            choice.reasoning,
            tuple(choice.tool_calls),
            tuple(choice.logprobs),
        )
        for _ in (*self.take(delta), *self.end()):
            pass

    @property
    def complete(self) -> bool:
        return self.finish_reason != "length"

    def end(self) -> Iterator[Json]:
        """Close what is open. An answer that says nothing at all is an empty message."""
        if not any(item["type"] != "reasoning" for item in self.items):
            yield from self._open("message")
        last = len(self.items) - 1
        status = "completed" if self.complete else "incomplete"
        yield from self._close(status if self._texts == last else "completed")
        for index in self._calls.values():
            item = self.items[index]
            item["status"] = status if index == last else "completed"
            where = {"item_id": item["id"], "output_index": index}
            done = {"type": "response.function_call_arguments.done", "name": item["name"]}
            yield done | where | {"arguments": item["arguments"]}
            yield _done(index, item)

    def abandon(self) -> None:
        """The answer broke off: what was open stays incomplete."""
        for item in self.items:
            if item["status"] == "in_progress":
                item["status"] = "incomplete"

    def _open(self, kind: str) -> Iterator[Json]:
        """Make sure that an item of this kind, message or reasoning, is the one that text goes to."""
        if self._texts is not None:
            if self.items[self._texts]["type"] == kind:
                return
            yield from self._close("completed")
        item: Json = {"type": kind, "id": self._ids.next("rs" if kind == "reasoning" else "msg")}
        own: Json = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
        item |= own | {"status": "in_progress", "content": []}
        self._texts = len(self.items)
        self.items.append(item)
        yield _added(self._texts, item)
        part: Json = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        yield {"type": "response.content_part.added"} | self._where() | {"part": dict(part)}

    def _add(self, text: str) -> Iterator[Json]:
        assert self._texts is not None
        item = self.items[self._texts]
        part = item["content"][0]
        part["text"] += text
        if item["type"] == "reasoning":
            yield {"type": "response.reasoning_text.delta"} | self._where() | {"delta": text}
            return
        told = self._tell(part)
        yield {"type": "response.output_text.delta"} | self._where() | {"delta": text, "logprobs": told}

    def _tell(self, part: Json) -> list[Json]:
        told, self._logprobs = self._logprobs, []
        part["logprobs"] = part["logprobs"] + told
        return told

    def _close(self, status: str) -> Iterator[Json]:
        """End the open message or reasoning, if there is one."""
        if self._texts is None:
            return
        index, item = self._texts, self.items[self._texts]
        part, where = item["content"][0], self._where()
        if item["type"] == "reasoning":
            yield {"type": "response.reasoning_text.done"} | where | {"text": part["text"]}
        else:
            self._tell(part)
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.output_text.done"} | where | told
        yield {"type": "response.content_part.done"} | where | {"part": dict(part)}
        item["status"] = status
        self._texts = None
        yield _done(index, item)

    def _call(self, piece: ToolCall) -> Iterator[Json]:
        index = self._calls.get(piece.index)
        if index is None:
            yield from self._close("completed")
            index = self._calls[piece.index] = len(self.items)
            item_id = self._ids.next("fc")
            item = call_item(item_id, piece.id or item_id.replace("fc_", "call_"), piece.name or "", "")
            self.items.append(item | {"status": "in_progress"})
            yield _added(index, self.items[index])
        if piece.arguments:
            item = self.items[index]
            item["arguments"] += piece.arguments
            where = {"item_id": item["id"], "output_index": index}
            yield {"type": "response.function_call_arguments.delta"} | where | {"delta": piece.arguments}

    def _where(self) -> Json:
        assert self._texts is not None
        return {"item_id": self.items[self._texts]["id"], "output_index": self._texts, "content_index": 0}


def _added(index: int, item: Json) -> Json:
    content: Json = {"content": []} if "content" in item else {}
    return {"type": "response.output_item.added", "output_index": index, "item": item | content}


def _done(index: int, item: Json) -> Json:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def _logprob(one: TokenLogprob) -> Json:
    return _entry(one.token, one.logprob or 0.0) | {"top_logprobs": [_entry(*other) for other in one.top]}


def _entry(token: str, logprob: float) -> Json:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}
