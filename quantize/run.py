"""Quantizes a base, measures the loss of quality, and publishes the result if it passes its gate."""

import shutil
from pathlib import Path

from quantize.card import REPORT, BaseCard, checkpoint_facts, library_versions, read_card, verify, write_card
from quantize.config import QuantizeConfig, recipe_sha256
from quantize.errors import GateFailed, ParentEmbeds, ParentQuantized, WindowTooLong
from quantize.eval_text import EvaluationText
from quantize.progress import OnProgress, silent
from quantize.report import render_markdown
from quantize.store import base_dir, is_current, keep_rejected, locked, rejected_dir, staged


def quantize(
    parent_dir: Path,
    config: QuantizeConfig,
    text: EvaluationText,
    bases_root: Path,
    on_progress: OnProgress = silent,
) -> BaseCard:
    """Publishes `<bases_root>/<parent>-nf4/` if it passes its gate; returns its card.

    A base that is there, intact, and made from the same parent, settings and text is kept as it is. Raises
    GateFailed (with the report; its card and report.md are kept under `.rejected/`, its weights are not),
    ParentQuantized, ParentEmbeds, WindowTooLong, TextTooShort, ScoreNotFinite, or what `verify` raises about
    the parent.
    """
    parent = verify(parent_dir)
    if parent.parent is not None:
        raise ParentQuantized(parent.name, parent.scheme)
    if parent.embedding is not None:
        raise ParentEmbeds(parent.name)
    if config.window_tokens > parent.max_context_tokens:
        raise WindowTooLong(config.window_tokens, parent.max_context_tokens)
    home = base_dir(bases_root, f"{parent.name}-nf4")
    recipe = recipe_sha256(config, parent=parent.weights_sha256, text=text.sha256)
    with locked(home):
        if is_current(home, recipe):
            return read_card(home)
        # Here, because torch takes seconds to load: reuse must not wait.
        from quantize import evaluate
        from quantize.schemes import nf4

        windows = evaluate.text_windows(parent_dir, config, text)
        with staged(home) as draft:
            on_progress("quantizing", 0.0)
            nf4.write_nf4(parent_dir, draft, config)
            report = evaluate.compare(parent_dir, draft, windows, config, text, on_progress)
            card = BaseCard(
                name=home.name,
                source=parent.source,
                licence=parent.licence,
                parameters=parent.parameters,
                tool_parser=parent.tool_parser,
                reasoning_parser=parent.reasoning_parser,
                scheme=config.scheme,
                parent=parent.name,
                parent_sha256=parent.weights_sha256,
                recipe_sha256=recipe,
                report=report,
                libraries=library_versions(("torch", "transformers", "bitsandbytes", "safetensors")),
                **checkpoint_facts(draft),
            )
            (draft / REPORT).write_text(render_markdown(card, report), encoding="utf-8")
            write_card(draft, card)
            if not report.gate.passed:
                keep_rejected(draft, bases_root, card.name)
                raise GateFailed(card.name, report.gate.reason, report.model_dump(mode="json"))
        shutil.rmtree(rejected_dir(bases_root, card.name), ignore_errors=True)
    on_progress("published", 1.0)
    return card
