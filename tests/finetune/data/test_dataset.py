"""A faulty row is dropped with its reason and its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.data.dataset import (
    CONVERSATION_CHARS_MAX,
    LINE_BYTES_MAX,
    MESSAGES_MAX,
    Conversation,
    DroppedRow,
    Fault,
    Message,
    parse_row,
    read_rows,
)
from finetune.errors import DataUnreadable
from tests.support.finetune_samples import line, write_lines

USER = {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Hello."}


def messages(*parts: object) -> bytes:
    return json.dumps({"messages": list(parts)}).encode()


FAULTY = {
    Fault.LINE_TOO_LONG: b" " * (LINE_BYTES_MAX + 1),
    Fault.NOT_UTF8: b'{"messages": "\xff"}',
    Fault.BROKEN_JSON: b'{"messages": [',
    Fault.NOT_AN_OBJECT: b'["messages"]',
    Fault.UNSUPPORTED_KEY: json.dumps({"messages": [USER, ANSWER], "tools": []}).encode(),
    Fault.MISSING_MESSAGES: b'{"prompt": "Hi"}',
    Fault.TOO_MANY_MESSAGES: messages(*[USER, ANSWER] * MESSAGES_MAX),
    Fault.NOT_A_MESSAGE: messages("Hi?", ANSWER),
    Fault.UNKNOWN_ROLE: messages(USER, {"role": "bot", "content": "Hello."}),
    Fault.MISPLACED_SYSTEM: messages(USER, {"role": "system", "content": "Be kind."}, ANSWER),
    Fault.NOT_TEXT: messages({"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, ANSWER),
    Fault.EMPTY_CONTENT: messages({"role": "user", "content": " \n"}, ANSWER),
    Fault.EMPTY_ANSWER: messages(USER, {"role": "assistant", "content": ""}),
    Fault.CONTROL_TOKEN: messages(USER, {"role": "assistant", "content": "Bye<|im_end|>"}),
    Fault.NO_QUESTION: messages(ANSWER, USER, ANSWER),
    Fault.NO_ANSWER: messages(USER, ANSWER, USER),
    Fault.TOO_LONG: messages({"role": "user", "content": "x" * CONVERSATION_CHARS_MAX}, ANSWER),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_row_is_dropped_with_its_reason_and_line(fault: Fault) -> None:
    assert parse_row(FAULTY[fault], 17) == DroppedRow(17, fault)


def test_every_fault_of_a_single_row_has_an_example_here() -> None:
    assert set(Fault) - set(FAULTY) == {Fault.DUPLICATE, Fault.NEAR_DUPLICATE}


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"[" * 100_000, Fault.BROKEN_JSON),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', Fault.UNKNOWN_ROLE),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', Fault.NOT_UTF8),
        (messages(USER, {"role": "assistant", "content": None}), Fault.EMPTY_ANSWER),
        (messages(USER, {"role": "assistant", "content": "x", "tool_calls": []}), Fault.UNSUPPORTED_KEY),
        (messages(USER, {"role": "assistant", "content": "x", "weight": 0}), Fault.UNSUPPORTED_KEY),
    ],
)
def test_hostile_and_unsupported_rows_are_dropped_not_raised(raw: bytes, fault: Fault) -> None:
    assert parse_row(raw, 1) == DroppedRow(1, fault)


def test_a_good_row_keeps_its_messages_and_its_line() -> None:
    assert parse_row(line("Hi?", "Hello.", system="Be kind.").encode(), 3) == Conversation(
        (Message("system", "Be kind."), Message("user", "Hi?"), Message("assistant", "Hello.")), 3
    )


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line("a", "b").encode() + b"\r\n\n{\n" + line("c", "d").encode())
    assert [(row.line, type(row)) for row in read_rows(path)] == [
        (1, Conversation),
        (3, DroppedRow),
        (4, Conversation),
    ]


def test_a_file_with_too_many_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.dataset.FILE_ROWS_MAX", 2)
    with pytest.raises(DataUnreadable, match="more than 2 lines"):
        list(read_rows(write_lines(tmp_path / "rows.jsonl", [line("a", "b")] * 3)))


def test_a_file_with_too_many_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.dataset.FILE_BYTES_MAX", 10)
    with pytest.raises(DataUnreadable, match="larger than 10 bytes"):
        list(read_rows(write_lines(tmp_path / "rows.jsonl", [line("a", "b")])))


def test_a_file_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataUnreadable, match="No such file"):
        list(read_rows(tmp_path / "rows.jsonl"))
