"""Perplexity counts every token of a window but its first, whatever the batch size."""

from math import log
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantize import perplexity as perplexity_module
from quantize.errors import ScoreNotFinite, TextTooShort
from quantize.evaluate import load_for_scoring
from quantize.perplexity import even_windows, perplexity, window_nlls


class Bigram:
    """A model over three tokens. Its next token depends on the present one only."""

    config = SimpleNamespace(vocab_size=3)

    def __init__(self, probabilities: list[list[float]]) -> None:
        self.logits = torch.tensor(probabilities).log()

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[ids])


def test_the_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary(tiny: Path) -> None:
    model = load_for_scoring(tiny, quantized=False)
    model.lm_head.weight.data.zero_()
    windows = torch.arange(8 * 32).view(8, 32)
    assert perplexity(window_nlls(model, windows)) == pytest.approx(49152, rel=1e-6)


def test_a_window_scores_every_token_but_its_first() -> None:
    model = Bigram([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 0.0, 0.0]])
    assert window_nlls(model, torch.tensor([[0, 0, 1], [2, 0, 1]])) == pytest.approx(
        [-(log(0.5) + log(0.25)) / 2, -(log(1.0) + log(0.25)) / 2]
    )


def test_the_size_of_a_batch_does_not_change_the_score(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_for_scoring(tiny, quantized=False)
    windows = torch.arange(8 * 32).view(8, 32)
    fractions: list[float] = []
    together = window_nlls(model, windows)
    monkeypatch.setattr(perplexity_module, "LOGITS_BYTES_MAX", 1)
    assert window_nlls(model, windows, fractions.append) == pytest.approx(together, rel=1e-5)
    assert fractions == [window / 8 for window in range(1, 9)]


def test_a_loss_that_is_not_a_number_is_an_error_not_a_score() -> None:
    model = Bigram([[1.0, 0.0, 0.0]] * 3)
    with pytest.raises(ScoreNotFinite) as caught:
        window_nlls(model, torch.tensor([[0, 0], [0, 1]]))
    assert caught.value.window == 1


def test_windows_are_disjoint_and_spread_over_the_whole_text() -> None:
    windows = even_windows(range(100), windows=4, window_tokens=10)
    assert [window.tolist() for window in windows] == [
        list(range(start, start + 10)) for start in (0, 20, 50, 70)
    ]


def test_a_text_may_fill_its_windows_exactly() -> None:
    assert even_windows(range(40), windows=4, window_tokens=10).flatten().tolist() == list(range(40))


def test_a_text_that_does_not_fill_its_windows_is_refused() -> None:
    with pytest.raises(TextTooShort) as caught:
        even_windows(range(39), windows=4, window_tokens=10)
    assert (caught.value.tokens, caught.value.tokens_min) == (39, 40)
