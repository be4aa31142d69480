import shutil
from math import exp, log
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from quantize import nf4
from quantize.card import REPORT, WEIGHTS, BaseCard, checkpoint_files, read_card, verify
from quantize.errors import (
    CardMissing,
    ChecksumMismatch,
    GateFailed,
    ParentQuantized,
    TextTooShort,
    WindowTooLong,
)
from quantize.interval import Estimate
from quantize.nf4 import load_for_scoring
from quantize.report import decide
from quantize.run import quantize
from quantize.spec import GateSpec, QuantizeSpec
from quantize.store import rejected_dir
from quantize.text import EvaluationText


@pytest.fixture
def impossible(nf4_spec: QuantizeSpec) -> QuantizeSpec:
    """A gate that only a miracle passes."""
    return nf4_spec.model_copy(update={"gate": GateSpec(perplexity_ratio_max=0.5)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty root for what is quantized from the shared tiny base."""
    return tmp_path / "bases"


def test_the_quantized_base_is_smaller_and_knows_its_parent(tiny: Path, tiny_nf4: BaseCard) -> None:
    parent = read_card(tiny)
    assert verify(tiny.parent / "tiny-nf4") == tiny_nf4
    assert (tiny_nf4.name, tiny_nf4.scheme, tiny_nf4.parent) == ("tiny-nf4", "bnb-nf4", "tiny")
    assert tiny_nf4.parent_sha256 == parent.weights_sha256
    assert tiny_nf4.bytes_on_disk < parent.bytes_on_disk
    assert (tiny_nf4.parameters, tiny_nf4.licence) == (parent.parameters, parent.licence)


def test_the_tokenizer_and_the_template_are_the_parents(tiny: Path, tiny_nf4: BaseCard) -> None:
    parent = read_card(tiny).files_sha256
    assert tiny_nf4.files_sha256.keys() == parent.keys()
    changed = {name for name, sha256 in parent.items() if tiny_nf4.files_sha256[name] != sha256}
    assert changed == {"config.json"}


def test_weights_move_by_no_more_than_a_step_of_the_format(tiny: Path, tiny_nf4: BaseCard) -> None:
    before = load_for_scoring(tiny, quantized=False).state_dict()
    after = load_for_scoring(tiny.parent / tiny_nf4.name, quantized=True).state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if "_proj" not in name:
            assert torch.equal(weight, after[name])
            continue
        blocks, error = weight.view(-1, 64), (weight - after[name]).view(-1, 64)
        # Half of NF4's widest gap (-1 to -0.696) times the block's scale, which has 8 bits itself.
        assert (error.abs().amax(1) <= 0.16 * blocks.abs().amax(1)).all()
        assert error.abs().max() > 0


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


def test_a_base_of_the_same_parent_settings_and_text_is_reused(
    tiny: Path,
    tiny_nf4: BaseCard,
    nf4_spec: QuantizeSpec,
    text: EvaluationText,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> NoReturn:
        raise AssertionError("this must not be called")

    monkeypatch.setattr(nf4, "write_nf4", refuse)
    assert quantize(tiny, nf4_spec, text, tiny.parent) == tiny_nf4


def test_quantizing_twice_gives_the_same_bytes_and_losses(
    tiny: Path, tiny_nf4: BaseCard, nf4_spec: QuantizeSpec, text: EvaluationText, root: Path
) -> None:
    again = quantize(tiny, nf4_spec, text, root)
    assert again.weights_sha256 == tiny_nf4.weights_sha256
    assert again.report is not None
    assert tiny_nf4.report is not None
    assert again.report.perplexity_after == pytest.approx(tiny_nf4.report.perplexity_after, rel=1e-6)


def test_a_failed_gate_leaves_no_servable_base_but_its_reasons(
    tiny: Path, impossible: QuantizeSpec, text: EvaluationText, root: Path
) -> None:
    with pytest.raises(GateFailed) as caught:
        quantize(tiny, impossible, text, root)
    assert not caught.value.report.gate.passed
    with pytest.raises(CardMissing):
        verify(root / "tiny-nf4")
    assert not list(root.rglob("*.safetensors"))
    rejected = rejected_dir(root, "tiny-nf4")
    assert read_card(rejected).report == caught.value.report
    assert "FAILED" in (rejected / REPORT).read_text()
    assert checkpoint_files(rejected) == []


def test_a_failed_gate_leaves_the_base_that_was_served(
    tiny: Path, tiny_nf4: BaseCard, impossible: QuantizeSpec, text: EvaluationText
) -> None:
    with pytest.raises(GateFailed):
        quantize(tiny, impossible, text, tiny.parent)
    assert verify(tiny.parent / tiny_nf4.name) == tiny_nf4


@pytest.mark.parametrize(("limit", "passed"), [(1.2, True), (1.1, False)])
def test_the_upper_end_of_the_interval_decides(limit: float, passed: bool) -> None:
    verdict = decide(GateSpec(perplexity_ratio_max=limit), Estimate(log(1.05), log(1.0), log(1.15)))
    assert verdict.passed is passed
    assert f"{exp(log(1.15)):.4f}" in verdict.reason


def test_what_is_quantized_is_not_quantized_again(
    tiny: Path, tiny_nf4: BaseCard, nf4_spec: QuantizeSpec, text: EvaluationText
) -> None:
    with pytest.raises(ParentQuantized):
        quantize(tiny.parent / tiny_nf4.name, nf4_spec, text, tiny.parent)


def test_a_damaged_parent_is_refused(
    tiny: Path, nf4_spec: QuantizeSpec, text: EvaluationText, root: Path
) -> None:
    damaged = shutil.copytree(tiny, root / "tiny")
    (damaged / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(ChecksumMismatch):
        quantize(damaged, nf4_spec, text, root)


def test_a_short_text_is_refused_before_any_work(tiny: Path, nf4_spec: QuantizeSpec, root: Path) -> None:
    with pytest.raises(TextTooShort):
        quantize(tiny, nf4_spec, EvaluationText("short", "A few words.", "0" * 64), root)


def test_windows_beyond_the_context_are_refused(
    tiny: Path, nf4_spec: QuantizeSpec, text: EvaluationText, root: Path
) -> None:
    long = nf4_spec.model_copy(update={"window_tokens": 2049})
    with pytest.raises(WindowTooLong):
        quantize(tiny, long, text, root)
