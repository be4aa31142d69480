"""Cleaning drops duplicates, and nothing else."""

from __future__ import annotations

import pytest

from finetune.data.clean import clean, comparable, tidied
from finetune.data.dataset import Conversation, DroppedRow, Fault, Message


def row(number: int, question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), number)


def test_the_first_of_exact_duplicates_is_kept() -> None:
    cleaned = clean([row(1, "Open?", "Yes."), row(2, "Closed?", "No."), row(3, "Open? ", "Yes.")])
    assert [row.line for row in cleaned.rows] == [1, 2]
    assert cleaned.dropped == (DroppedRow(3, Fault.DUPLICATE),)


def test_rows_that_differ_in_case_spacing_and_punctuation_are_near_duplicates() -> None:
    cleaned = clean([row(1, "Are you open?", "Yes."), row(2, "are  you OPEN", "yes")])
    assert cleaned.dropped == (DroppedRow(2, Fault.NEAR_DUPLICATE),)


def test_contradictory_answers_are_kept_and_reported() -> None:
    cleaned = clean([row(1, "Open?", "Yes."), row(2, "Cost?", "3 euros."), row(3, "open", "No.")])
    assert len(cleaned.rows) == 3
    assert cleaned.contradictory == (1, 3)


def test_a_row_that_only_looks_filled_is_dropped() -> None:
    cleaned = clean([row(1, "Open?", "\u200b"), row(2, "\ufeff", "Yes.")])
    assert cleaned.dropped == (DroppedRow(1, Fault.EMPTY_ANSWER), DroppedRow(2, Fault.EMPTY_CONTENT))


@pytest.mark.parametrize(("one", "other"), [("2.50", "250"), ("5%", "5"), ("-5", "5"), ("3 €", "3 £")])
def test_different_amounts_are_never_the_same_text(one: str, other: str) -> None:
    assert comparable(one) != comparable(other)


def test_text_without_any_word_still_differs() -> None:
    assert comparable("?") != comparable("!")


def test_tidying_keeps_indentation_and_paragraphs() -> None:
    assert tidied("  a\u00a0 b \r\n\n\n\n  - c\x00 \n") == "a b\n\n  - c"


def test_tidying_composes_accents() -> None:
    assert tidied("cafe\u0301") == "caf\u00e9"
