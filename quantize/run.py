"""Quantize a base, measure what it cost, and publish it only if it is good enough."""

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer

from quantize.base import facts_of
from quantize.card import (
    REPORT,
    WEIGHTS,
    BaseCard,
    QuantizationReport,
    library_versions,
    read_card,
    verify,
    write_card,
)
from quantize.errors import GateFailed, ParentQuantized
from quantize.interval import paired_difference
from quantize.nf4 import load_for_scoring, write_nf4
from quantize.perplexity import even_windows, perplexity, window_nlls
from quantize.progress import OnProgress, silent
from quantize.report import decide, render_markdown
from quantize.spec import QuantizeSpec, recipe_sha256
from quantize.store import base_dir, is_current, keep_rejected, locked, rejected_dir, staged
from quantize.text import EvaluationText


def quantize(
    parent_dir: Path,
    spec: QuantizeSpec,
    text: EvaluationText,
    bases_root: Path,
    on_progress: OnProgress = silent,
) -> BaseCard:
    """Publish `<bases_root>/<parent>-nf4/` if it passes its gate, and return its card.

    A base that is there, intact, and made from the same parent, settings and text is kept as it is. Raises
    GateFailed (with the report; its card and report.md are kept under `.rejected/`, its weights are not),
    ParentQuantized, TextTooShort, ScoreNotFinite, or what `verify` raises about the parent.
    """
    parent = verify(parent_dir)
    if parent.parent is not None:
        raise ParentQuantized(parent.name, parent.scheme)
    home = base_dir(bases_root, f"{parent.name}-nf4")
    recipe = recipe_sha256(spec, parent=parent.weights_sha256, text=text.sha256)
    with locked(home):
        if is_current(home, recipe):
            return read_card(home)
        windows = _windows(parent_dir, spec, text)
        with staged(home) as draft:
            on_progress("quantizing", 0.0)
            write_nf4(parent_dir, draft, spec)
            report = _measure(parent_dir, draft, windows, spec, text, on_progress)
            card = BaseCard(
                name=home.name,
                source=parent.source,
                licence=parent.licence,
                parameters=parent.parameters,
                scheme=spec.scheme,
                parent=parent.name,
                parent_sha256=parent.weights_sha256,
                recipe_sha256=recipe,
                report=report,
                libraries=library_versions(("torch", "transformers", "bitsandbytes", "safetensors")),
                **facts_of(draft),
            )
            (draft / REPORT).write_text(render_markdown(card, report), encoding="utf-8")
            write_card(draft, card)
            if not report.gate.passed:
                keep_rejected(draft, bases_root, card.name)
                raise GateFailed(card.name, report.gate.reason, report)
        shutil.rmtree(rejected_dir(bases_root, card.name), ignore_errors=True)
    on_progress("published", 1.0)
    return card


def _windows(parent_dir: Path, spec: QuantizeSpec, text: EvaluationText) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(parent_dir, local_files_only=True)
    token_ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    return even_windows(token_ids, spec.windows, spec.window_tokens)


def _measure(
    parent_dir: Path,
    draft: Path,
    windows: torch.Tensor,
    spec: QuantizeSpec,
    text: EvaluationText,
    on_progress: OnProgress,
) -> QuantizationReport:
    def score(directory: Path, stage: str, start: float, *, quantized: bool) -> list[float]:
        on_progress(stage, start)
        model = load_for_scoring(directory, quantized=quantized)
        return window_nlls(model, windows, lambda fraction: on_progress(stage, start + 0.4 * fraction))

    before = score(parent_dir, "measuring the original", 0.15, quantized=False)
    after = score(draft, "measuring the quantized base", 0.55, quantized=True)
    difference = paired_difference(before, after)
    return QuantizationReport(
        weights_bytes_before=(parent_dir / WEIGHTS).stat().st_size,
        weights_bytes_after=(draft / WEIGHTS).stat().st_size,
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
