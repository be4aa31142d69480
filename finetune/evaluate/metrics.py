"""Metrics of an adapter and its bare base on held-out rows, paired row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from finetune.base_model import load_model, load_tokenizer
from finetune.card import Metrics
from finetune.data.prepare import HELDOUT_ROWS_MIN
from finetune.errors import TooFewRows
from finetune.packing import answer_logits, bounded_groups, pack
from finetune.tokens import Example, load_examples

RESAMPLES = 2_000


def evaluate(
    base_dir: Path,
    adapter_dir: Path,
    heldout_file: Path,
    *,
    max_length_tokens: int,
    seed: int,
) -> Metrics:
    """Measures a saved adapter, as it would be published, and its base on a prepared held-out file.

    The measure is the answers' negative log-likelihood, in nats per token. All layers run here, so a fault
    in the activations that training caches would show.

    Raises:
        TooFewRows: fewer held-out rows than 3 are within max_length_tokens.
        BaseUnusable: the base does not load.
    """
    tokenizer = load_tokenizer(base_dir)
    examples, too_long = load_examples(tokenizer, heldout_file, max_length_tokens=max_length_tokens)
    if len(examples) < HELDOUT_ROWS_MIN:
        dropped = {"too_many_tokens": too_long}
        raise TooFewRows(heldout_file, "held-out", len(examples), HELDOUT_ROWS_MIN, dropped)
    model = PeftModel.from_pretrained(load_model(base_dir), adapter_dir).eval()
    with model.disable_adapter():
        base = row_nlls(model, examples)
    adapter = row_nlls(model, examples)
    return compare(base, adapter, [example.answer_tokens for example in examples], seed=seed)


def row_nlls(model: Any, examples: Sequence[Example]) -> list[float]:
    """Returns each row's negative log-likelihood, summed over its answer tokens, in nats."""
    sums: list[float] = []
    for group in bounded_groups(range(len(examples)), examples):
        packed = pack([examples[row] for row in group])
        with torch.inference_mode():
            losses = cross_entropy(answer_logits(model, packed), packed.target, reduction="none").double()
        sums.extend(torch.zeros(packed.rows).double().index_add(0, packed.row, losses).tolist())
    return sums


def compare(
    base: Sequence[float],
    adapter: Sequence[float],
    tokens: Sequence[int],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Metrics:
    """Computes metrics from per-row sums: token-weighted means, and their difference with its interval.

    Rows, not tokens, are resampled, since the tokens of one answer are not independent; each resample keeps a
    row's two sums together. Percentile interval: Efron and Tibshirani, An Introduction to the Bootstrap
    (1993), chapter 13.
    """
    counts = np.asarray(tokens, dtype=np.float64)
    differences = np.asarray(adapter) - np.asarray(base)
    picks = np.random.default_rng(seed).integers(len(counts), size=(resamples, len(counts)))
    low, high = np.quantile(differences[picks].sum(axis=1) / counts[picks].sum(axis=1), [0.025, 0.975])
    base_nll, adapter_nll = sum(base) / counts.sum(), sum(adapter) / counts.sum()
    return Metrics(
        heldout_rows=len(counts),
        heldout_answer_tokens=int(counts.sum()),
        base_nll=base_nll,
        adapter_nll=adapter_nll,
        difference=differences.sum() / counts.sum(),
        difference_ci95=(low, high),
        base_perplexity=_perplexity(base_nll),
        adapter_perplexity=_perplexity(adapter_nll),
        bootstrap_resamples=resamples,
        bootstrap_seed=seed,
    )


def _perplexity(nll: float) -> float:
    # exp overflows above 709 nats a token. A ruined model must fail its gate, and not raise OverflowError.
    return math.exp(min(nll, 700.0))
