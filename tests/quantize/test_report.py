"""A report reads the same in the terminal, beside the card and as JSON."""

from pathlib import Path

from quantize.card import REPORT, BaseCard
from quantize.report import report_json, report_rows


def test_people_find_the_report_beside_the_card(tiny: Path, tiny_nf4: BaseCard) -> None:
    readable = (tiny.parent / tiny_nf4.name / REPORT).read_text()
    assert tiny_nf4.report is not None
    for fact in (
        f"{tiny_nf4.report.perplexity_after:.3f}",
        tiny_nf4.report.text_sha256,
        "passed",
        "bitsandbytes",
    ):
        assert fact in readable


def test_the_terminal_and_the_file_show_the_same_values(tiny: Path, tiny_nf4: BaseCard) -> None:
    assert tiny_nf4.report is not None
    readable = (tiny.parent / tiny_nf4.name / REPORT).read_text()
    for label, value in report_rows(tiny_nf4, tiny_nf4.report):
        assert f"| {label} | {value} |" in readable


def test_the_json_has_the_names_and_values_of_the_card(tiny_nf4: BaseCard) -> None:
    fields = report_json(tiny_nf4)
    assert fields.items() <= tiny_nf4.model_dump(mode="json").items()
    assert fields.keys() >= {"name", "parent", "scheme", "report"}
