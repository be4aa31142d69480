"""A quantized base is published if it passes its gate; a refused one leaves only its reasons."""

import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from quantize.card import REPORT, WEIGHTS, BaseCard, checkpoint_files, read_card, verify
from quantize.config import GateConfig, QuantizeConfig
from quantize.errors import (
    CardMissing,
    ChecksumMismatch,
    GateFailed,
    ParentQuantized,
    TextTooShort,
    WindowTooLong,
)
from quantize.eval_text import EvaluationText
from quantize.run import quantize
from quantize.schemes import nf4
from quantize.store import rejected_dir


@pytest.fixture
def impossible(nf4_config: QuantizeConfig) -> QuantizeConfig:
    """Settings whose gate no quantized base passes."""
    return nf4_config.model_copy(update={"gate": GateConfig(perplexity_ratio_max=0.5)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty root for bases quantized from the shared tiny base."""
    return tmp_path / "bases"


def test_the_quantized_base_is_smaller_and_knows_its_parent(tiny: Path, tiny_nf4: BaseCard) -> None:
    parent = read_card(tiny)
    assert verify(tiny.parent / "tiny-nf4") == tiny_nf4
    assert (tiny_nf4.name, tiny_nf4.scheme, tiny_nf4.parent) == ("tiny-nf4", "bnb-nf4", "tiny")
    assert tiny_nf4.parent_sha256 == parent.weights_sha256
    assert tiny_nf4.bytes_on_disk < parent.bytes_on_disk
    assert (tiny_nf4.parameters, tiny_nf4.licence) == (parent.parameters, parent.licence)


def test_a_base_of_the_same_parent_settings_and_text_is_reused(
    tiny: Path,
    tiny_nf4: BaseCard,
    nf4_config: QuantizeConfig,
    text: EvaluationText,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> NoReturn:
        raise AssertionError("this must not be called")

    monkeypatch.setattr(nf4, "write_nf4", refuse)
    assert quantize(tiny, nf4_config, text, tiny.parent) == tiny_nf4


def test_quantizing_twice_gives_the_same_bytes_and_losses(
    tiny: Path, tiny_nf4: BaseCard, nf4_config: QuantizeConfig, text: EvaluationText, root: Path
) -> None:
    again = quantize(tiny, nf4_config, text, root)
    assert again.weights_sha256 == tiny_nf4.weights_sha256
    assert again.report is not None
    assert tiny_nf4.report is not None
    assert again.report.perplexity_after == pytest.approx(tiny_nf4.report.perplexity_after, rel=1e-6)


def test_a_failed_gate_leaves_no_servable_base_but_its_reasons(
    tiny: Path, impossible: QuantizeConfig, text: EvaluationText, root: Path
) -> None:
    with pytest.raises(GateFailed) as caught:
        quantize(tiny, impossible, text, root)
    assert not caught.value.report["gate"]["passed"]
    with pytest.raises(CardMissing):
        verify(root / "tiny-nf4")
    assert not list(root.rglob("*.safetensors"))
    rejected = rejected_dir(root, "tiny-nf4")
    report = read_card(rejected).report
    assert report is not None
    assert report.model_dump(mode="json") == caught.value.report
    assert "FAILED" in (rejected / REPORT).read_text()
    assert checkpoint_files(rejected) == []


def test_a_failed_gate_leaves_the_base_that_was_served(
    tiny: Path, tiny_nf4: BaseCard, impossible: QuantizeConfig, text: EvaluationText
) -> None:
    with pytest.raises(GateFailed):
        quantize(tiny, impossible, text, tiny.parent)
    assert verify(tiny.parent / tiny_nf4.name) == tiny_nf4


def test_what_is_quantized_is_not_quantized_again(
    tiny: Path, tiny_nf4: BaseCard, nf4_config: QuantizeConfig, text: EvaluationText
) -> None:
    with pytest.raises(ParentQuantized):
        quantize(tiny.parent / tiny_nf4.name, nf4_config, text, tiny.parent)


def test_a_damaged_parent_is_refused(
    tiny: Path, nf4_config: QuantizeConfig, text: EvaluationText, root: Path
) -> None:
    damaged = shutil.copytree(tiny, root / "tiny")
    (damaged / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(ChecksumMismatch):
        quantize(damaged, nf4_config, text, root)


def test_a_short_text_is_refused_before_any_work(tiny: Path, nf4_config: QuantizeConfig, root: Path) -> None:
    with pytest.raises(TextTooShort):
        quantize(tiny, nf4_config, EvaluationText("short", "A few words.", "0" * 64), root)


def test_windows_beyond_the_context_are_refused(
    tiny: Path, nf4_config: QuantizeConfig, text: EvaluationText, root: Path
) -> None:
    long = nf4_config.model_copy(update={"window_tokens": 2049})
    with pytest.raises(WindowTooLong):
        quantize(tiny, long, text, root)
