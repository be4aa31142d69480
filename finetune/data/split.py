"""Splits rows by their question into a training side and a held-out side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from finetune.data.clean import comparable
from finetune.data.dataset import Conversation


@dataclass(frozen=True, slots=True)
class Split:
    train: tuple[Conversation, ...]
    heldout: tuple[Conversation, ...]


def split(rows: Iterable[Conversation], *, fraction: float, seed: int) -> Split:
    """Splits rows so that no question is on both sides, the same way every time.

    Questions (first user messages, compared without case, punctuation and spacing) are ordered by a seeded
    hash, and held out in that order until the side has `fraction` of the rows. A question with more rows than
    that stays in training, so the held-out side has at most about twice its share.
    """
    groups: dict[str, list[Conversation]] = {}
    for row in rows:
        groups.setdefault(comparable(row.question), []).append(row)
    target = round(fraction * sum(map(len, groups.values())))
    heldout_questions: set[str] = set()
    count = 0
    for question in sorted(groups, key=lambda text: _rank(text, seed)):
        if count >= target:
            break
        if len(groups[question]) <= target:
            heldout_questions.add(question)
            count += len(groups[question])
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for question, group in groups.items():
        sides[question in heldout_questions].extend(group)
    train, heldout = (tuple(sorted(side, key=lambda row: row.line)) for side in sides)
    return Split(train, heldout)


def _rank(question: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{question}".encode()).digest()
