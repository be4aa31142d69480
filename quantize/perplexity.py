"""Perplexity of a model on a text, window by window."""

from collections.abc import Callable, Sequence
from math import exp, isfinite
from statistics import fmean
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from quantize.errors import ScoreNotFinite, TextTooShort

LOGITS_BYTES_MAX = 256 * 2**20  # of one batch: larger ones were slower on CPU, in page faults


def even_windows(token_ids: Sequence[int], windows: int, window_tokens: int) -> torch.Tensor:
    """Cuts disjoint windows, evenly spread over a text: int64 of shape (windows, window_tokens).

    Disjoint windows are how quantized models are usually compared (GPTQ, arXiv:2210.17323); a sliding window
    gives lower perplexities at several times the cost (transformers' guide "Perplexity of fixed-length
    models"). Raises TextTooShort.
    """
    slots = len(token_ids) // window_tokens
    if slots < windows:
        raise TextTooShort(len(token_ids), windows * window_tokens)
    starts = [index * slots // windows * window_tokens for index in range(windows)]
    return torch.tensor([list(token_ids[start : start + window_tokens]) for start in starts])


def window_nlls(
    model: Any, windows: torch.Tensor, on_fraction: Callable[[float], None] = lambda fraction: None
) -> list[float]:
    """Computes the mean negative log-likelihood of each window, in nats per token.

    The first token of a window is context only: windows of T tokens score T - 1. Raises ScoreNotFinite.
    """
    count, window_tokens = windows.shape
    batch = max(1, LOGITS_BYTES_MAX // (4 * window_tokens * model.config.vocab_size))
    nlls: list[float] = []
    for ids in windows.split(batch):
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        nlls += loss.view(len(ids), -1).double().mean(dim=1).tolist()
        on_fraction(len(nlls) / count)
    for window, nll in enumerate(nlls):
        if not isfinite(nll):
            raise ScoreNotFinite(window)
    return nlls


def perplexity(nlls: Sequence[float]) -> float:
    """Returns exp of the mean NLL over windows of equal length."""
    return exp(fmean(nlls))
