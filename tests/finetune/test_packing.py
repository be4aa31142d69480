"""Packed rows have the loss that they have alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from finetune.evaluate.metrics import row_nlls
from finetune.packing import bounded_groups, pack
from finetune.tokens import Example


def alone(model: Any, example: Example) -> float:
    """Computes the reference loss: one row, all logits, the usual shift by one."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
    losses = cross_entropy(logits[:-1], torch.tensor(example.ids[1:]), reduction="none")
    return float(losses[torch.tensor(example.answer[1:])].sum())


def test_packed_rows_have_the_loss_that_they_have_alone(model: Any, examples: list[Example]) -> None:
    expected = [alone(model, example) for example in examples]
    assert row_nlls(model, examples) == pytest.approx(expected, rel=1e-5)


def test_packs_are_bounded_and_lose_no_row(
    model: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = row_nlls(model, examples)
    monkeypatch.setattr("finetune.packing.PACK_TOKENS_MAX", 80)
    lengths = [len(example.ids) for example in examples]
    groups = list(bounded_groups(range(len(examples)), examples))
    assert [row for group in groups for row in group] == list(range(len(examples)))
    assert all(len(group) == 1 or sum(lengths[row] for row in group) <= 80 for group in groups)
    assert 1 < len(groups) < len(examples)
    assert row_nlls(model, examples) == pytest.approx(together, rel=1e-5)


def test_equal_rows_share_every_token(model: Any, examples: list[Example]) -> None:
    twins = [examples[0], examples[0]]
    assert pack(twins).ids.shape[1] == len(examples[0].ids) - 1
    assert row_nlls(model, twins) == pytest.approx([alone(model, examples[0])] * 2, rel=1e-5)


def test_a_common_beginning_is_computed_once(examples: list[Example]) -> None:
    separate = sum(len(example.ids) - 1 for example in examples)
    packed = pack(examples)
    shared = int((packed.branch == -1).sum())
    assert shared > 20
    assert packed.ids.shape[1] == separate - shared * (len(examples) - 1)
