"""A card is read back exactly, and a base that differs from its card is refused."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.card import (
    CARD,
    WEIGHTS,
    BaseCard,
    QuantizationReport,
    checkpoint_files,
    read_card,
    verify,
    write_card,
)
from quantize.errors import CardInvalid, CardMissing, ChecksumMismatch, FilesUnexpected


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "tiny")


def test_a_card_reads_back_as_it_was_written(tiny: Path, tmp_path: Path) -> None:
    card = read_card(tiny)
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card


def test_the_card_describes_the_checkpoint(tiny: Path) -> None:
    card = verify(tiny)
    assert (card.architecture, card.scheme, card.parent) == ("LlamaForCausalLM", "bfloat16", None)
    assert (card.vocab_size, card.hidden_size, card.layers) == (49152, 64, 2)
    assert card.max_context_tokens == 2048
    assert card.bytes_on_disk == sum(path.stat().st_size for path in checkpoint_files(tiny))


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_flipped_byte_is_detected(base: Path, name: str) -> None:
    content = bytearray((base / name).read_bytes())
    content[len(content) // 2] ^= 1
    (base / name).write_bytes(content)
    with pytest.raises(ChecksumMismatch) as caught:
        verify(base)
    assert caught.value.path == str(base / name)


def _remove_the_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def _add_weights(base: Path) -> None:
    (base / "more.safetensors").write_bytes(b"")


@pytest.mark.parametrize("damage", [_remove_the_tokenizer, _add_weights])
def test_a_base_holds_exactly_the_files_of_its_card(base: Path, damage: Callable[[Path], None]) -> None:
    damage(base)
    with pytest.raises(FilesUnexpected):
        verify(base)


def test_a_directory_without_a_card_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(CardMissing):
        read_card(tmp_path)


@pytest.mark.parametrize("card", ["", "{}", "[1]", '{"schema_version": 2}'])
def test_a_card_that_is_not_understood_is_refused(tmp_path: Path, card: str) -> None:
    (tmp_path / CARD).write_text(card)
    with pytest.raises(CardInvalid):
        read_card(tmp_path)


def test_a_card_with_an_unknown_field_is_refused(base: Path) -> None:
    card = (base / CARD).read_text()
    (base / CARD).write_text(card.replace("{", '{"blessed": true,', 1))
    with pytest.raises(CardInvalid, match="blessed"):
        read_card(base)


def test_a_base_that_failed_its_gate_does_not_verify(base: Path, report: QuantizationReport) -> None:
    failed = report.model_copy(update={"gate": report.gate.model_copy(update={"passed": False})})
    write_card(
        base,
        read_card(base).model_copy(
            update={"scheme": "bnb-nf4", "parent": "tiny", "parent_sha256": "0" * 64, "report": failed}
        ),
    )
    with pytest.raises(CardInvalid, match="gate did not pass"):
        verify(base)


def test_a_quantized_base_without_its_parent_and_report_is_refused(tiny: Path) -> None:
    fields = read_card(tiny).model_dump() | {"scheme": "bnb-nf4"}
    with pytest.raises(ValueError, match="belong to every quantized base"):
        BaseCard.model_validate(fields)


def test_reading_cards_needs_neither_torch_nor_transformers() -> None:
    script = "import sys, quantize.card; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
