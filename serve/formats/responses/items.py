"""Converts the Responses API's items: input to stored items, items to the messages that a model reads.

An item is plain JSON in OpenAI's format (`openai.types.responses.ResponseItem`); clients read it and the
store keeps it in this form.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from serve.engine.protocol import Message, ToolCall
from serve.errors import InvalidRequest, ItemNotFound
from serve.formats.responses.request import (
    CustomToolCall,
    CustomToolCallOutput,
    FunctionCall,
    FunctionCallOutput,
    InputItem,
    InputMessage,
    ItemReference,
)
from serve.formats.responses.tools import custom_arguments, model_name

Json = dict[str, Any]


class Ids:
    """Makes the ids of a response and of its items. Every id contains the request's id.

    used: how many item ids exist already.
    """

    def __init__(self, request_id: str, used: int = 0) -> None:
        self._hex = request_id.removeprefix("req_")
        self._count = used

    @property
    def response(self) -> str:
        return f"resp_{self._hex}"

    def next(self, prefix: str) -> str:
        """A new item id, such as msg_…"""
        self._count += 1
        return f"{prefix}_{self._hex}{self._count:04x}"


def response_of(item_id: str) -> str | None:
    """The id of the response that the item belongs to, as its input or its output; None if it is not ours."""
    match = _ITEM_ID.fullmatch(item_id)
    return f"resp_{match[1]}" if match else None


def input_items(
    body_input: str | Sequence[InputItem], ids: Ids, stored: Mapping[str, Json], context: Sequence[Json]
) -> list[Json]:
    """The body's input as items with ids. Reasoning that the client sends back is left out.

    stored: the items that it may refer to. context: the items of earlier turns, which are there already.
    Raises ItemNotFound, and InvalidRequest for a reference to an item that is there.
    """
    if isinstance(body_input, str):
        body_input = [InputMessage(role="user", content=body_input)]
    known = {item["id"] for item in context}
    items = []
    for entry in body_input:
        if isinstance(entry, ItemReference):
            if entry.id in known:
                raise InvalidRequest(
                    f"Duplicate item found with id {entry.id}. Remove duplicate items from your input.",
                    "input",
                    "invalid_value",
                )
            if entry.id not in stored:
                raise ItemNotFound(entry.id)
            known.add(entry.id)
            items.append(stored[entry.id])
        elif (item := _item(entry, ids)) is not None:
            items.append(item)
    return items


def messages(items: Iterable[Json], instructions: str | None) -> tuple[Message, ...]:
    """The conversation in the engine's terms. A call joins the assistant's turn before it.

    Raises InvalidRequest if an item is the output of a call that does not exist.
    """
    conversation = [Message("system", instructions)] if instructions is not None else []
    call_ids: set[str] = set()
    for item in items:
        match item["type"]:
            case "message":
                role = "system" if item["role"] == "developer" else item["role"]
                conversation.append(Message(role, "".join(part["text"] for part in item["content"])))
            case "function_call" | "custom_tool_call":
                call_ids.add(item["call_id"])
                follows_assistant = bool(conversation) and conversation[-1].role == "assistant"
                turn = conversation.pop() if follows_assistant else Message("assistant", None)
                index = len(turn.tool_calls)
                is_custom = item["type"] == "custom_tool_call"
                arguments = custom_arguments(item["input"]) if is_custom else item["arguments"]
                name = model_name(item["name"], item.get("namespace"))
                call = ToolCall(index, item["call_id"], name, arguments)
                # A turn that only calls has an empty text, which is no content.
                conversation.append(Message("assistant", turn.content or None, (*turn.tool_calls, call)))
            case "function_call_output" | "custom_tool_call_output":
                if item["call_id"] not in call_ids:
                    raise InvalidRequest(
                        f"No tool call found for function call output with call_id {item['call_id']}.",
                        "input",
                    )
                conversation.append(Message("tool", item["output"], tool_call_id=item["call_id"]))
    return tuple(conversation)


def _item(entry: InputItem, ids: Ids) -> Json | None:
    if isinstance(entry, InputMessage):
        return message_item(ids.next("msg"), entry.role, entry.text)
    if isinstance(entry, FunctionCall):
        return call_item(ids.next("fc"), entry.call_id, entry.name, entry.arguments, entry.namespace)
    if isinstance(entry, CustomToolCall):
        return custom_call_item(ids.next("ctc"), entry.call_id, entry.name, entry.input, entry.namespace)
    if isinstance(entry, FunctionCallOutput | CustomToolCallOutput):
        return {
            "type": entry.type,
            "id": ids.next("fco" if entry.type == "function_call_output" else "ctco"),
            "status": "completed",
            "call_id": entry.call_id,
            "output": entry.text,
        }
    return None


def message_item(item_id: str, role: str, text: str) -> Json:
    part: Json = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": item_id, "status": "completed", "role": role, "content": [part]}


def call_item(item_id: str, call_id: str, name: str, arguments: str, namespace: str | None = None) -> Json:
    return _call("function_call", item_id, call_id, name, namespace) | {"arguments": arguments}


def custom_call_item(item_id: str, call_id: str, name: str, text: str, namespace: str | None = None) -> Json:
    return _call("custom_tool_call", item_id, call_id, name, namespace) | {"input": text}


def _call(kind: str, item_id: str, call_id: str, name: str, namespace: str | None) -> Json:
    item: Json = {"type": kind, "id": item_id, "status": "completed", "call_id": call_id, "name": name}
    return item if namespace is None else item | {"namespace": namespace}


# As `Ids` makes them of a request's id.
_ITEM_ID = re.compile(r"[a-z]{2,4}_([0-9a-f]{32})[0-9a-f]{4}")
