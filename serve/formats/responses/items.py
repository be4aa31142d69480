"""Items: what a conversation is made of in the Responses API, and the messages that a model reads.

An item is plain JSON in OpenAI's shape (`openai.types.responses.ResponseItem`), as clients read it and as it
is stored.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from serve.engine.protocol import Message, ToolCall
from serve.errors import InvalidRequest
from serve.formats.responses.request import (
    FunctionCall,
    FunctionCallOutput,
    InputItem,
    InputMessage,
)

Json = dict[str, Any]


class Ids:
    """Makes the ids of a response and of its items: all tell the request that they belong to.

    used: how many ids of items there are already.
    """

    def __init__(self, request_id: str, used: int = 0) -> None:
        self._hex = request_id.removeprefix("req_")
        self._count = used

    @property
    def response(self) -> str:
        return f"resp_{self._hex}"

    def next(self, prefix: str) -> str:
        """Such as msg_…; each differs."""
        self._count += 1
        return f"{prefix}_{self._hex}{self._count:04x}"


def input_items(given: str | Sequence[InputItem], ids: Ids) -> list[Json]:
    """What the client sent, as items with ids. Reasoning that it sends back is left out."""
    if isinstance(given, str):
        given = [InputMessage(role="user", content=given)]
    return [item for one in given if (item := _item(one, ids)) is not None]


def messages(items: Iterable[Json], instructions: str | None) -> tuple[Message, ...]:
    """The conversation in the engine's terms; calls join the assistant's turn that they follow.

    Raises InvalidRequest if an item is the output of a call that is not there.
    """
    found = [Message("system", instructions)] if instructions is not None else []
    called: set[str] = set()
    for item in items:
        match item["type"]:
            case "message":
                role = "system" if item["role"] == "developer" else item["role"]
                found.append(Message(role, "".join(part["text"] for part in item["content"])))
            case "function_call":
                called.add(item["call_id"])
                last = found.pop() if found and found[-1].role == "assistant" else Message("assistant", None)
                index = len(last.tool_calls)
                call = ToolCall(index, item["call_id"], item["name"], item["arguments"] or "{}")
                # An empty text is what a model says that only calls.
                found.append(Message("assistant", last.content or None, (*last.tool_calls, call)))
            case "function_call_output":
                if item["call_id"] not in called:
                    raise InvalidRequest(
                        f"No tool call found for function call output with call_id {item['call_id']}.",
                        "input",
                    )
                found.append(Message("tool", item["output"], tool_call_id=item["call_id"]))
    return tuple(found)


def _item(one: InputItem, ids: Ids) -> Json | None:
    if isinstance(one, InputMessage):
        return message_item(ids.next("msg"), one.role, one.text)
    if isinstance(one, FunctionCall):
        return call_item(ids.next("fc"), one.call_id, one.name, one.arguments)
    if isinstance(one, FunctionCallOutput):
        return {
            "type": "function_call_output",
            "id": ids.next("fco"),
            "status": "completed",
            "call_id": one.call_id,
            "output": one.text,
        }
    return None


def message_item(item_id: str, role: str, text: str) -> Json:
    part: Json = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": item_id, "status": "completed", "role": role, "content": [part]}


def call_item(item_id: str, call_id: str, name: str, arguments: str) -> Json:
    return {
        "type": "function_call",
        "id": item_id,
        "status": "completed",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }
