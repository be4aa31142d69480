"""Errors in a batch's input are reported by line, before any line runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from serve.batches.batches import ERRORS_MAX
from serve.batches.input import validate
from tests.support.batching import CHAT, INPUT, jsonl, line

BAD: dict[str, tuple[bytes, str, int | None]] = {
    "nothing": (b"\n\n", "empty_file", None),
    "no json": (b"{\n", "invalid_json_line", 1),
    "no object": (b"[]\n", "invalid_json_line", 1),
    "too deep": (b"[" * 1_000, "body_too_complex", 1),
    "a line of more than a body": (b"[" * 100_000, "request_too_large", 1),
    "no custom_id": (jsonl({"method": "POST"}), "missing_required_parameter", 1),
    "no text": (jsonl(line("a\x00b")), "invalid_value", 1),
    "half a character": (jsonl(line("\ud800")), "invalid_value", 1),
    "twice": (jsonl(line("a"), line("b"), line("a")), "duplicate_custom_id", 3),
    "method": (jsonl(line("a") | {"method": "GET"}), "invalid_method", 1),
    "url": (jsonl(line("a", url="/v1/completions")), "invalid_url", 1),
    "body": (jsonl(line("a") | {"body": "hello"}), "missing_required_parameter", 1),
    "field": (jsonl(line("a"), line("b", temperature=9)), "invalid_value", 2),
    "bound": (jsonl(line("a", n=99)), "invalid_request", 1),
    "stream": (jsonl(line("a", stream=True)), "unsupported_parameter", 1),
    "harmful": (jsonl(line("a", cache_salt="x")), "unsupported_parameter", 1),
    "large": (jsonl(line("a", user="x" * 10_001)), "request_too_large", 1),
    "too many": (jsonl(*(line(str(n)) for n in range(51))), "too_many_lines", 51),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named(file: Path, what: str) -> None:
    content, code, number = BAD[what]
    file.write_bytes(content)
    _, errors = validate(file, CHAT, INPUT)
    assert [(error.code, error.line) for error in errors] == [(code, number)]


def test_all_that_is_wrong_is_told_at_once_up_to_a_bound(file: Path) -> None:
    file.write_bytes(jsonl(line("a", n=99), line("b"), line("b")) + b"x\n")
    assert [error.line for error in validate(file, CHAT, INPUT)[1]] == [1, 3, 4]
    file.write_bytes(b"x\n" * 1000)
    bounds = replace(INPUT, lines=1000)
    assert len(validate(file, CHAT, bounds)[1]) == ERRORS_MAX


def test_blank_lines_count_in_the_numbers_and_nowhere_else(file: Path) -> None:
    file.write_bytes(b"\n" + jsonl(line("a")) + b"  \r\n" + jsonl(line("b", n=99)).rstrip())
    count, errors = validate(file, CHAT, INPUT)
    assert (count, [error.line for error in errors]) == (2, [4])


def test_text_completions_are_read_as_such(file: Path) -> None:
    good = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": "x"},
    }
    file.write_bytes(jsonl(good))
    assert validate(file, "/v1/completions", INPUT) == (1, [])
