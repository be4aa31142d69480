"""Several rows as one sequence: their common beginning once, then every row's own continuation.

Rows of chat data begin alike (a system message, a template's preamble), and differ in length. Packed as a
tree, with an attention mask by which a row sees the common beginning and itself, nothing is padded and
nothing is computed twice. Results are those of separate rows, up to rounding.
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
class Batch:
    """T packed tokens of `rows` rows, and the N answer tokens to predict.

    Shapes: ids, positions (1, T); mask (1, 1, T, T), true where a query may look at a key; branch (T,), the
    row that a token belongs to or -1 when shared; at, target, row (N,): the hidden state at packed place `at`
    must predict token `target` of row `row`.
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
        """Per-row tensors (length, D), alike where they are shared, packed like the ids as (1, T, D)."""
        shared = int((self.branch == _SHARED).sum())
        own = [row[shared:] for row in rows]
        return torch.cat([rows[0][:shared], *own]).unsqueeze(0)

    def scatter(self, packed: Tensor) -> list[Tensor]:
        """The inverse of `gather`: (1, T, D) as one tensor (length, D) a row."""
        return [packed[0][(self.branch == _SHARED) | (self.branch == row)] for row in range(self.rows)]


def bounded(rows: Sequence[int], examples: Sequence[Example]) -> Iterator[list[int]]:
    """Row numbers in groups whose tokens are at most PACK_TOKENS_MAX together, or of one long row each.

    Every pair of packed tokens has a place in the mask, so a pack of many long rows would cost by the square.
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


def answer_logits(model: Any, batch: Batch, hidden: Tensor | None = None) -> Tensor:
    """Logits (N, vocabulary) for the batch's answer tokens, and for no others.

    A small model's vocabulary is a good part of its arithmetic, and prompts need none of it. With `hidden`
    (1, T, D) the model starts from that instead of from the ids' embeddings.
    """
    start = {"input_ids": batch.ids} if hidden is None else {"inputs_embeds": hidden}
    logits: Tensor = model(
        **start,
        position_ids=batch.positions,
        attention_mask=batch.mask,
        logits_to_keep=batch.at,
        use_cache=False,
    ).logits[0]
    return logits


def pack(examples: Sequence[Example]) -> Batch:
    """Examples as one Batch. A row's last token predicts nothing, so it is not computed."""
    shared = _common_prefix([example.ids[:-1] for example in examples])
    ids = list(examples[0].ids[:shared])
    positions = list(range(shared))
    branch = [_SHARED] * shared
    at: list[int] = []
    target: list[int] = []
    row: list[int] = []
    for index, example in enumerate(examples):
        shift = len(ids) - shared
        for place, wanted in enumerate(example.answer):
            if wanted:
                before = place - 1
                at.append(before if before < shared else before + shift)
                target.append(example.ids[place])
                row.append(index)
        own = range(shared, len(example.ids) - 1)
        ids.extend(example.ids[shared:-1])
        positions.extend(own)
        branch.extend([index] * len(own))
    branches, order = torch.tensor(branch), torch.tensor(positions)
    visible = (branches == branches[:, None]) | (branches == _SHARED)
    mask = visible & (order <= order[:, None])
    return Batch(
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
    """How many leading ids all rows share."""
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared
