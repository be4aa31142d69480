"""From measurements to a verdict that people can read."""

from collections.abc import Sequence
from math import exp

from rich.markup import escape
from rich.table import Table

from quantize.card import BaseCard, GateVerdict, QuantizationReport
from quantize.interval import Estimate
from quantize.spec import GateSpec


def decide(gate: GateSpec, difference: Estimate) -> GateVerdict:
    """Hold a difference in NLL (nats per token) against the gate.

    The interval's upper end decides, so that few or noisy windows cannot pass by luck.
    """
    limit, worst = gate.perplexity_ratio_max, exp(difference.high)
    passed = worst <= limit
    return GateVerdict(
        rule=f"perplexity ratio at most {limit:g} at the upper end of its 95% interval",
        passed=passed,
        reason=f"perplexity ratio {exp(difference.mean):.4f}, at most {worst:.4f} with 95% confidence: "
        f"{'within' if passed else 'above'} the limit of {limit:g}",
    )


def lines_of(card: BaseCard, report: QuantizationReport) -> Sequence[tuple[str, str]]:
    """What a report says, as pairs of label and value."""
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


def render_table(card: BaseCard, report: QuantizationReport) -> Table:
    """A report for the terminal."""
    table = Table(title=f"Quantization of {card.parent}", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for label, value in lines_of(card, report):
        table.add_row(label, escape(value))
    return table


def render_markdown(card: BaseCard, report: QuantizationReport) -> str:
    """A report for a file beside the card."""
    rows = "\n".join(f"| {label} | {value} |" for label, value in lines_of(card, report))
    libraries = ", ".join(f"{name} {version}" for name, version in card.libraries.items())
    return (
        f"# Quantization of {card.parent}\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"Losses are measured in float32 on the published weights, over disjoint windows spread evenly over\n"
        f"the text; the interval is that of a paired comparison over windows. Made with {libraries}.\n"
    )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
