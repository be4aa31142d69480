"""The loss of a base before and after quantizing, on the same windows of the same text."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.card import WEIGHTS, QuantizationReport
from quantize.config import QuantizeConfig
from quantize.eval_text import EvaluationText
from quantize.gate import decide
from quantize.perplexity import even_windows, perplexity, window_nlls
from quantize.progress import OnProgress
from quantize.statistics import paired_difference


def text_windows(parent_dir: Path, config: QuantizeConfig, text: EvaluationText) -> torch.Tensor:
    """Cuts the text into windows of the parent's tokens: int64 of shape (windows, window_tokens).

    Raises TextTooShort.
    """
    tokenizer = AutoTokenizer.from_pretrained(parent_dir, local_files_only=True)
    token_ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    return even_windows(token_ids, config.windows, config.window_tokens)


def load_for_scoring(directory: Path, *, quantized: bool) -> Any:
    """Loads a base with its weights expanded to float32, in which its loss is measured.

    Expanding NF4 once and computing in float32 scores exactly the published weights, without the rounding
    of a particular kernel. It is also the fast way: on an AVX2 machine (SmolLM2-135M, one thread, 1,024
    tokens) 4 s, against 28 s through bitsandbytes' own 4-bit kernels and 32 s in bfloat16.
    """
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map={"": "cpu"}, local_files_only=True
    )
    if quantized:
        model = model.dequantize(dtype=torch.float32)
    return model.eval()


def compare(
    parent_dir: Path,
    quantized_dir: Path,
    windows: torch.Tensor,
    config: QuantizeConfig,
    text: EvaluationText,
    on_progress: OnProgress,
) -> QuantizationReport:
    """Scores both bases on the windows and decides the gate. Raises ScoreNotFinite."""

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
        window_tokens=config.window_tokens,
        text=text.name,
        text_sha256=text.sha256,
        gate=decide(config.gate, difference),
    )
