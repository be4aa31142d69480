"""Packing rows as a tree, and keeping the frozen layers' output, change no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from finetune.base import load_model
from finetune.batch import answer_logits, bounded, pack
from finetune.data.rows import Message
from finetune.evaluate import row_nlls
from finetune.stem import layers_only, stem_outputs
from finetune.tokens import Example, encode


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return load_model(tiny_base)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    rows = [
        ("Open?", "Yes, from 6 to 23."),
        ("Open?", "No."),
        ("What does a day pass cost?", "A day pass costs 9 euros."),
    ]
    turns = [
        Message(role, text) for row in rows[1:] for role, text in zip(("user", "assistant"), row, strict=True)
    ]
    pairs = [(Message("user", question), Message("assistant", answer)) for question, answer in rows]
    return [encode(tokenizer, messages) for messages in (*pairs, turns)]


def alone(model: Any, example: Example) -> float:
    """The reference: one row, all logits, the usual shift by one."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
    losses = cross_entropy(logits[:-1], torch.tensor(example.ids[1:]), reduction="none")
    return float(losses[torch.tensor(example.answer[1:])].sum())


def test_packed_rows_have_the_loss_that_they_have_alone(model: Any, examples: list[Example]) -> None:
    wanted = [alone(model, example) for example in examples]
    assert row_nlls(model, examples) == pytest.approx(wanted, rel=1e-5)


def test_packs_are_bounded_and_lose_no_row(
    model: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = row_nlls(model, examples)
    monkeypatch.setattr("finetune.batch.PACK_TOKENS_MAX", 80)
    lengths = [len(example.ids) for example in examples]
    groups = list(bounded(range(len(examples)), examples))
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
    batch = pack(examples)
    shared = int((batch.branch == -1).sum())
    assert shared > 20
    assert batch.ids.shape[1] == separate - shared * (len(examples) - 1)


def test_running_the_lower_layers_first_gives_the_same_logits(model: Any, examples: list[Example]) -> None:
    stems = stem_outputs(model, examples, cut=3)
    batch = pack(examples)
    with torch.no_grad():
        whole = answer_logits(model, batch)
        with layers_only(model, 3, None):
            upper = answer_logits(model, batch, batch.gather(stems))
    torch.testing.assert_close(upper, whole)
    assert len(model.get_decoder().layers) == 4
