"""The report holds what was measured on both bases."""

from pathlib import Path

import pytest

from quantize.card import WEIGHTS, BaseCard
from quantize.eval_text import EvaluationText


def test_the_report_says_what_was_measured(tiny: Path, tiny_nf4: BaseCard, text: EvaluationText) -> None:
    report = tiny_nf4.report
    assert report is not None
    assert report.weights_bytes_after == (tiny.parent / "tiny-nf4" / WEIGHTS).stat().st_size
    assert report.size_ratio < 1
    assert report.perplexity_ratio == pytest.approx(report.perplexity_after / report.perplexity_before)
    low, high = report.perplexity_ratio_ci95
    assert low < report.perplexity_ratio < high
    assert (report.tokens_scored, report.windows, report.window_tokens) == (8 * 31, 8, 32)
    assert (report.text, report.text_sha256) == (text.name, text.sha256)
    assert report.gate.passed
