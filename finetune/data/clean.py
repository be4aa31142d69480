"""Cleans rows: normalises whitespace, and drops duplicates."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from finetune.data.dataset import Conversation, DroppedRow, Fault

_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff]")
_GAPS = re.compile(r"(?<=\S)[ \t\u00a0\u202f]+")
_BLANK_LINES = re.compile(r"\n{3,}")
# Sentence punctuation only: the point of 2.50, signs, currencies and percentages stay.
_PUNCTUATION = re.compile(r"[;!?\u00a1\u00bf\"'\u2018\u2019\u201c\u201d]|[.,:](?!\d)|(?<!\d)[.,:]")


@dataclass(frozen=True, slots=True)
class CleanedRows:
    """Cleaned rows. `contradictory` holds the lines of kept rows that answer one question differently."""

    rows: tuple[Conversation, ...]
    dropped: tuple[DroppedRow, ...]
    contradictory: tuple[int, ...]


def clean(rows: Iterable[Conversation]) -> CleanedRows:
    """Normalises every row, and keeps the first of the rows that are equal or nearly equal.

    Nearly equal means equal but for letter case, punctuation and spacing in the whole conversation. A
    question that is answered differently is no duplicate: it is kept, and reported as contradictory.
    """
    unique: list[Conversation] = []
    dropped: list[DroppedRow] = []
    exact: set[tuple[tuple[str, str], ...]] = set()
    near: set[tuple[tuple[str, str], ...]] = set()
    by_prompt: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for row in rows:
        tidy = replace(
            row, messages=tuple(replace(message, content=tidied(message.content)) for message in row.messages)
        )
        if any(not message.content for message in tidy.messages):
            # The content had invisible characters only, which the parser does not take for blank.
            blank = next(message for message in tidy.messages if not message.content)
            fault = Fault.EMPTY_ANSWER if blank.role == "assistant" else Fault.EMPTY_CONTENT
            dropped.append(DroppedRow(row.line, fault))
            continue
        text = tuple((message.role, message.content) for message in tidy.messages)
        comparable_text = tuple((role, comparable(content)) for role, content in text)
        if text in exact:
            dropped.append(DroppedRow(row.line, Fault.DUPLICATE))
        elif comparable_text in near:
            dropped.append(DroppedRow(row.line, Fault.NEAR_DUPLICATE))
        else:
            unique.append(tidy)
            exact.add(text)
            near.add(comparable_text)
            by_prompt.setdefault(comparable_text[:-1], []).append(row.line)
    return CleanedRows(tuple(unique), tuple(dropped), _contradictory(by_prompt.values()))


def tidied(text: str) -> str:
    """Returns the text in Unicode NFC without invisible characters, ragged line ends or runs of blanks.

    Indentation and single empty lines stay: answers may hold lists and code.
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = _GAPS.sub(" ", _INVISIBLE.sub("", text))
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", lines).strip()


def comparable(text: str) -> str:
    """Returns the text as rows are compared: case folded, sentence punctuation and extra spaces removed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = " ".join(_PUNCTUATION.sub(" ", folded).split())
    return words or " ".join(folded.split())


def _contradictory(groups: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Returns the lines of all groups that share a prompt but not its answer."""
    return tuple(sorted(line for group in groups if len(group) > 1 for line in group))
