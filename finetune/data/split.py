"""The held-out side: rows that training never sees, chosen by their question."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from finetune.data.clean import comparable
from finetune.data.rows import Conversation


@dataclass(frozen=True, slots=True)
class Split:
    train: tuple[Conversation, ...]
    heldout: tuple[Conversation, ...]


def split(rows: Iterable[Conversation], *, fraction: float, seed: int) -> Split:
    """Divide rows so that no question is on both sides, the same way every time.

    Questions (first user messages, compared without case, punctuation and spacing) are put in the order of a
    seeded hash, and taken for the held-out side until it has `fraction` of the rows. A question with more
    rows than that side is to have stays in training, so the held-out side is at most about twice its share.
    """
    groups: dict[str, list[Conversation]] = {}
    for row in rows:
        groups.setdefault(comparable(row.question), []).append(row)
    target = round(fraction * sum(map(len, groups.values())))
    held: set[str] = set()
    count = 0
    for question in sorted(groups, key=lambda text: _rank(text, seed)):
        if count >= target:
            break
        if len(groups[question]) <= target:
            held.add(question)
            count += len(groups[question])
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for question, group in groups.items():
        sides[question in held].extend(group)
    train, heldout = (tuple(sorted(side, key=lambda row: row.line)) for side in sides)
    return Split(train, heldout)


def _rank(question: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{question}".encode()).digest()
