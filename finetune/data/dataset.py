"""Reads data files in OpenAI's chat fine-tuning format, line by line.

A line is `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`. Lines
with parts that training would ignore (tools, images, per-message weights) are dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from finetune.errors import DataUnreadable

FILE_BYTES_MAX = 256 << 20
FILE_ROWS_MAX = 50_000
LINE_BYTES_MAX = 256 << 10
MESSAGES_MAX = 64
CONVERSATION_CHARS_MAX = 32_000

ROLES = frozenset({"system", "user", "assistant"})
# A tokenizer reads such text as a control token, which could end a turn early or forge one.
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>")


class Fault(StrEnum):
    """Reason for dropping a row."""

    LINE_TOO_LONG = "line_too_long"
    NOT_UTF8 = "not_utf8"
    BROKEN_JSON = "broken_json"
    NOT_AN_OBJECT = "not_an_object"
    UNSUPPORTED_KEY = "unsupported_key"
    MISSING_MESSAGES = "missing_messages"
    TOO_MANY_MESSAGES = "too_many_messages"
    NOT_A_MESSAGE = "not_a_message"
    UNKNOWN_ROLE = "unknown_role"
    MISPLACED_SYSTEM = "misplaced_system"
    NOT_TEXT = "not_text"
    EMPTY_CONTENT = "empty_content"
    EMPTY_ANSWER = "empty_answer"
    CONTROL_TOKEN = "control_token"
    NO_QUESTION = "no_question"
    NO_ANSWER = "no_answer"
    TOO_LONG = "too_long"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, the last one the assistant's. `line` counts from 1 in the customer's file."""

    messages: tuple[Message, ...]
    line: int

    @property
    def question(self) -> str:
        """The first user message, by which rows are split."""
        return next(message.content for message in self.messages if message.role == "user")

    def to_json(self) -> str:
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        return json.dumps({"messages": messages}, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class DroppedRow:
    line: int
    fault: Fault


def read_rows(path: Path) -> Iterator[Conversation | DroppedRow]:
    """Parses every line of a file. Blank lines are skipped; a byte order mark is allowed.

    Raises:
        DataUnreadable: no readable file, or more than FILE_BYTES_MAX or FILE_ROWS_MAX in it.
    """
    try:
        with path.open("rb") as stream:
            if stream.seek(0, 2) > FILE_BYTES_MAX:
                raise DataUnreadable(path, f"larger than {FILE_BYTES_MAX} bytes")
            stream.seek(0)
            for number, raw in enumerate(stream, start=1):
                if number > FILE_ROWS_MAX:
                    raise DataUnreadable(path, f"more than {FILE_ROWS_MAX} lines")
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield parse_row(line, number)
    except OSError as error:
        raise DataUnreadable(path, error.strerror or "cannot be read") from error


def parse_row(raw: bytes, line: int) -> Conversation | DroppedRow:
    """Parses one line into a conversation, or returns the first fault found in it."""
    parsed = _parse(raw)
    return DroppedRow(line, parsed) if isinstance(parsed, Fault) else Conversation(parsed, line)


def _parse(raw: bytes) -> tuple[Message, ...] | Fault:
    if len(raw) > LINE_BYTES_MAX:
        return Fault.LINE_TOO_LONG
    try:
        record = json.loads(raw.decode())
    except UnicodeDecodeError:
        return Fault.NOT_UTF8
    except (ValueError, RecursionError):
        return Fault.BROKEN_JSON
    if not isinstance(record, dict):
        return Fault.NOT_AN_OBJECT
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return Fault.MISSING_MESSAGES
    if len(record) > 1:
        return Fault.UNSUPPORTED_KEY
    if len(messages) > MESSAGES_MAX:
        return Fault.TOO_MANY_MESSAGES
    parsed: list[Message] = []
    for position, message in enumerate(messages):
        outcome = _parse_message(message, position)
        if isinstance(outcome, Fault):
            return outcome
        parsed.append(outcome)
    return _conversation_fault(parsed) or tuple(parsed)


def _parse_message(message: object, position: int) -> Message | Fault:
    if not isinstance(message, dict):
        return Fault.NOT_A_MESSAGE
    if not message.keys() <= {"role", "content"}:
        return Fault.UNSUPPORTED_KEY
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        return Fault.UNKNOWN_ROLE
    if role == "system" and position > 0:
        return Fault.MISPLACED_SYSTEM
    if content is not None and not isinstance(content, str):
        return Fault.NOT_TEXT
    if content is None or not content.strip():
        return Fault.EMPTY_ANSWER if role == "assistant" else Fault.EMPTY_CONTENT
    try:
        content.encode()
    except UnicodeEncodeError:
        # A JSON escape can hold half of a surrogate pair, which UTF-8 cannot.
        return Fault.NOT_UTF8
    if _CONTROL_TOKEN.search(content):
        return Fault.CONTROL_TOKEN
    return Message(role, content)


def _conversation_fault(messages: list[Message]) -> Fault | None:
    roles = [message.role for message in messages]
    if roles[-1] != "assistant":
        return Fault.NO_ANSWER
    if "user" not in roles[: roles.index("assistant")]:
        return Fault.NO_QUESTION
    if sum(len(message.content) for message in messages) > CONVERSATION_CHARS_MAX:
        return Fault.TOO_LONG
    return None
