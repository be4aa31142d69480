"""What quantizing cost: the loss of a base before and after, on the same windows of the same text."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from quantize.card import WEIGHTS, QuantizationReport
from quantize.interval import paired_difference
from quantize.nf4 import load_for_scoring
from quantize.perplexity import even_windows, perplexity, window_nlls
from quantize.progress import OnProgress
from quantize.report import decide
from quantize.spec import QuantizeSpec
from quantize.text import EvaluationText


def text_windows(parent_dir: Path, spec: QuantizeSpec, text: EvaluationText) -> torch.Tensor:
    """The text's windows as the parent's tokenizer reads them: int64 of shape (windows, window_tokens).

    Raises TextTooShort.
    """
    tokenizer = AutoTokenizer.from_pretrained(parent_dir, local_files_only=True)
    token_ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    return even_windows(token_ids, spec.windows, spec.window_tokens)


def compare(
    parent_dir: Path,
    quantized_dir: Path,
    windows: torch.Tensor,
    spec: QuantizeSpec,
    text: EvaluationText,
    on_progress: OnProgress,
) -> QuantizationReport:
    """Score both bases on the windows and hold the difference against the gate. Raises ScoreNotFinite."""

    def score(directory: Path, stage: str, start: float, *, quantized: bool) -> list[float]:
        on_progress(stage, start)
        model = load_for_scoring(directory, quantized=quantized)
        return window_nlls(model, windows, lambda fraction: on_progress(stage, start + 0.4 * fraction))

    before = score(parent_dir, "measuring the original", 0.15, quantized=False)
    after = score(quantized_dir, "measuring the quantized base", 0.55, quantized=True)
    difference = paired_difference(before, after)
    return QuantizationReport(
        weights_bytes_before=(parent_dir / WEIGHTS).stat().st_size,
        weights_bytes_after=(quantized_dir / WEIGHTS).stat().st_size,
        perplexity_before=perplexity(before),
        perplexity_after=perplexity(after),
        nll_difference=difference.mean,
        nll_difference_ci95=(difference.low, difference.high),
        tokens_scored=windows.numel() - len(windows),
        windows=len(windows),
        window_tokens=spec.window_tokens,
        text=text.name,
        text_sha256=text.sha256,
        gate=decide(spec.gate, difference),
    )
