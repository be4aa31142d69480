"""Quantize a base, measure what it cost, and publish it only if it is good enough."""

import shutil
from pathlib import Path

from quantize.base import facts_of
from quantize.card import REPORT, BaseCard, library_versions, read_card, verify, write_card
from quantize.errors import GateFailed, ParentQuantized, WindowTooLong
from quantize.progress import OnProgress, silent
from quantize.report import render_markdown
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
    ParentQuantized, WindowTooLong, TextTooShort, ScoreNotFinite, or what `verify` raises about the parent.
    """
    parent = verify(parent_dir)
    if parent.parent is not None:
        raise ParentQuantized(parent.name, parent.scheme)
    if spec.window_tokens > parent.max_context_tokens:
        raise WindowTooLong(spec.window_tokens, parent.max_context_tokens)
    home = base_dir(bases_root, f"{parent.name}-nf4")
    recipe = recipe_sha256(spec, parent=parent.weights_sha256, text=text.sha256)
    with locked(home):
        if is_current(home, recipe):
            return read_card(home)
        from quantize import measure, nf4  # torch: seconds that a base which is there need not cost

        windows = measure.text_windows(parent_dir, spec, text)
        with staged(home) as draft:
            on_progress("quantizing", 0.0)
            nf4.write_nf4(parent_dir, draft, spec)
            report = measure.compare(parent_dir, draft, windows, spec, text, on_progress)
            card = BaseCard(
                name=home.name,
                source=parent.source,
                licence=parent.licence,
                parameters=parent.parameters,
                tool_parser=parent.tool_parser,
                reasoning_parser=parent.reasoning_parser,
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
