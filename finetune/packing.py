"""Packing of several rows into one sequence: their common prefix once, then each row's own continuation.

Rows of chat data begin alike (a system message, a template's preamble) and differ in length. The attention
mask lets a row see the common prefix and itself, so nothing is padded and nothing is computed twice. The
results are those of separate rows, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.tokens import Example

if TYPE_CHECKING:
    from torch import Tensor

PACK_TOKENS_MAX = 1024
_SHARED = -1


@dataclass(frozen=True, slots=True)
class PackedRows:
    """T packed tokens of `rows` rows, and the N answer tokens to predict.

    Shapes: ids, positions (1, T); mask (1, 1, T, T), true where a query may attend to a key; branch (T,), the
    row that a token belongs to, or -1 if it is shared; at, target, row (N,): the hidden state at packed index
    `at` must predict token `target` of row `row`.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    branch: Tensor
    at: Tensor
    target: Tensor
    row: Tensor
    rows: int

    def gather(self, rows: Sequence[Tensor]) -> Tensor:
        """Packs per-row tensors (length, D) like the ids: (1, T, D). The first row gives the shared part."""
        shared = int((self.branch == _SHARED).sum())
        own = [row[shared:] for row in rows]
        return torch.cat([rows[0][:shared], *own]).unsqueeze(0)

    def scatter(self, packed: Tensor) -> list[Tensor]:
        """Splits (1, T, D) into one tensor (length, D) per row: the inverse of `gather`."""
        return [packed[0][(self.branch == _SHARED) | (self.branch == row)] for row in range(self.rows)]


def bounded_groups(rows: Sequence[int], examples: Sequence[Example]) -> Iterator[list[int]]:
    """Yields row numbers in groups of at most PACK_TOKENS_MAX tokens; a longer row is a group of its own.

    The mask grows with the square of the packed tokens, so packs are bounded.
    """
    group: list[int] = []
    tokens = 0
    for row in rows:
        length = len(examples[row].ids)
        if group and tokens + length > PACK_TOKENS_MAX:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += length
    if group:
        yield group


def answer_logits(model: Any, packed: PackedRows, hidden: Tensor | None = None) -> Tensor:
    """Computes logits (N, vocabulary) for the answer tokens only.

    In a small model the vocabulary is a large part of the arithmetic, and prompts need none of it. With
    `hidden` (1, T, D) the model starts from those states instead of from the ids' embeddings.
    """
    start = {"input_ids": packed.ids} if hidden is None else {"inputs_embeds": hidden}
    logits: Tensor = model(
        **start,
        position_ids=packed.positions,
        attention_mask=packed.mask,
        logits_to_keep=packed.at,
        use_cache=False,
    ).logits[0]
    return logits


def pack(examples: Sequence[Example]) -> PackedRows:
    """Packs examples into one sequence. A row's last token predicts nothing, so it is left out."""
    shared = _common_prefix([example.ids[:-1] for example in examples])
    ids = list(examples[0].ids[:shared])
    positions = list(range(shared))
    branch = [_SHARED] * shared
    at: list[int] = []
    target: list[int] = []
    row: list[int] = []
    for index, example in enumerate(examples):
        shift = len(ids) - shared
        for position, is_answer in enumerate(example.answer):
            if is_answer:
                before = position - 1
                at.append(before if before < shared else before + shift)
                target.append(example.ids[position])
                row.append(index)
        own = range(shared, len(example.ids) - 1)
        ids.extend(example.ids[shared:-1])
        positions.extend(own)
        branch.extend([index] * len(own))
    branches, order = torch.tensor(branch), torch.tensor(positions)
    visible = (branches == branches[:, None]) | (branches == _SHARED)
    mask = visible & (order <= order[:, None])
    return PackedRows(
        ids=torch.tensor([ids]),
        positions=order[None],
        mask=mask[None, None],
        branch=branches,
        at=torch.tensor(at),
        target=torch.tensor(target),
        row=torch.tensor(row),
        rows=len(examples),
    )


def _common_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """Counts the leading ids that all rows share."""
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared
