"""The report of a quantization, as rows for the terminal and as Markdown."""

from collections.abc import Sequence

from quantize.card import BaseCard, QuantizationReport


def report_rows(card: BaseCard, report: QuantizationReport) -> Sequence[tuple[str, str]]:
    """Returns the report as pairs of label and value."""
    low, high = report.perplexity_ratio_ci95
    return (
        ("Base", f"{card.name}, from {card.parent} ({card.scheme})"),
        ("Weights", f"{_megabytes(report.weights_bytes_before)} → {_megabytes(report.weights_bytes_after)}"),
        ("Size ratio", f"{report.size_ratio:.3f}"),
        ("Perplexity", f"{report.perplexity_before:.3f} → {report.perplexity_after:.3f}"),
        ("Perplexity ratio", f"{report.perplexity_ratio:.4f} (95% interval {low:.4f} to {high:.4f})"),
        (
            "Measured on",
            f"{report.text}: {report.tokens_scored} tokens in {report.windows} × {report.window_tokens}",
        ),
        ("Text sha256", report.text_sha256),
        ("Gate", report.gate.rule),
        ("Verdict", f"{'passed' if report.gate.passed else 'FAILED'}: {report.gate.reason}"),
    )


def report_json(card: BaseCard) -> dict[str, object]:
    """Returns the card's fields about its quantization, as JSON values under the card's names."""
    fields = {"name", "scheme", "parent", "parent_sha256", "weights_sha256", "report"}
    return card.model_dump(mode="json", include=fields)


def render_markdown(card: BaseCard, report: QuantizationReport) -> str:
    """Returns the report as the text of report.md, which lies beside the card."""
    rows = "\n".join(f"| {label} | {value} |" for label, value in report_rows(card, report))
    libraries = ", ".join(f"{name} {version}" for name, version in card.libraries.items())
    return (
        f"# Quantization of {card.parent}\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"Losses are measured in float32 on the published weights, over disjoint windows spread evenly over\n"
        f"the text; the interval is that of a paired comparison over windows. Made with {libraries}.\n"
    )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
