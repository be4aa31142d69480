"""Whitespace made regular, and rows that say nothing new dropped."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from finetune.data.rows import Conversation, Dropped, Fault

_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff]")
_GAPS = re.compile(r"(?<=\S)[ \t\u00a0\u202f]+")
_BLANK_LINES = re.compile(r"\n{3,}")
# Sentence punctuation; not the point of 2.50, not a sign, a currency or a percentage.
_PUNCTUATION = re.compile(r"[;!?\u00a1\u00bf\"'\u2018\u2019\u201c\u201d]|[.,:](?!\d)|(?<!\d)[.,:]")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """`contradictory` holds the lines that answer one question differently: kept, but worth a look."""

    rows: tuple[Conversation, ...]
    dropped: tuple[Dropped, ...]
    contradictory: tuple[int, ...]


def clean(rows: Iterable[Conversation]) -> Cleaned:
    """Normalise every row, then keep the first of those that are the same, or nearly the same, throughout.

    Near means equal but for letter case, punctuation and spacing in the whole conversation, so a question
    that is answered differently is no duplicate: it is kept, and reported as contradictory.
    """
    kept: list[Conversation] = []
    dropped: list[Dropped] = []
    exact: set[tuple[tuple[str, str], ...]] = set()
    near: set[tuple[tuple[str, str], ...]] = set()
    by_prompt: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for row in rows:
        tidy = replace(
            row, messages=tuple(replace(message, content=tidied(message.content)) for message in row.messages)
        )
        if any(not message.content for message in tidy.messages):
            # Only characters that show nothing: blank in a way that the parser cannot see.
            blank = next(message for message in tidy.messages if not message.content)
            fault = Fault.EMPTY_ANSWER if blank.role == "assistant" else Fault.EMPTY_CONTENT
            dropped.append(Dropped(row.line, fault))
            continue
        text = tuple((message.role, message.content) for message in tidy.messages)
        gist = tuple((role, comparable(content)) for role, content in text)
        if text in exact:
            dropped.append(Dropped(row.line, Fault.DUPLICATE))
        elif gist in near:
            dropped.append(Dropped(row.line, Fault.NEAR_DUPLICATE))
        else:
            kept.append(tidy)
            exact.add(text)
            near.add(gist)
            by_prompt.setdefault(gist[:-1], []).append(row.line)
    return Cleaned(tuple(kept), tuple(dropped), _several(by_prompt.values()))


def tidied(text: str) -> str:
    """Text in Unicode NFC without invisible characters, ragged line ends or runs of blanks.

    Indentation and single empty lines stay: answers may hold lists and code.
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = _GAPS.sub(" ", _INVISIBLE.sub("", text))
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", lines).strip()


def comparable(text: str) -> str:
    """The text as duplicates and splits compare it: case folded, sentence punctuation and spacing removed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    gist = " ".join(_PUNCTUATION.sub(" ", folded).split())
    return gist or " ".join(folded.split())


def _several(groups: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted(line for group in groups if len(group) > 1 for line in group))
