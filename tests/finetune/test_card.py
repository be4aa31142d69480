"""An adapter is refused unless its card describes exactly the bytes beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune.card import (
    AdapterCard,
    CardMismatch,
    CardUnreadable,
    InvalidName,
    content_version,
    read_card,
    validate_name,
    verify,
    write_card,
)
from tests.support.finetune_samples import card_for, staged_adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = staged_adapter(tmp_path / "adapter")
    write_card(directory, card_for(directory))
    return directory


def test_a_card_comes_back_as_it_was_written(adapter: Path) -> None:
    assert verify(adapter) == read_card(adapter) == card_for(adapter)


@pytest.mark.parametrize(
    ("name", "field"),
    [("adapter_model.safetensors", "weights_sha256"), ("adapter_config.json", "adapter_config_sha256")],
)
def test_a_flipped_bit_is_found(adapter: Path, name: str, field: str) -> None:
    data = bytearray((adapter / name).read_bytes())
    data[3] ^= 1
    (adapter / name).write_bytes(data)
    with pytest.raises(CardMismatch) as caught:
        verify(adapter)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"), [({"version": "0" * 16}, "version"), ({"config": {"rank": 5}}, "config_sha256")]
)
def test_a_card_that_contradicts_itself_is_refused(
    adapter: Path, changes: dict[str, object], field: str
) -> None:
    write_card(adapter, card_for(adapter, **changes))
    with pytest.raises(CardMismatch) as caught:
        verify(adapter)
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pkl", "README.md", ".hidden"])
def test_a_file_too_many_is_refused(adapter: Path, name: str) -> None:
    (adapter / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CardUnreadable, match="unexpected"):
        read_card(adapter)


def test_a_link_in_place_of_the_weights_is_refused(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter.parent / "elsewhere")
    weights.symlink_to(adapter.parent / "elsewhere")
    with pytest.raises(CardUnreadable, match="not plain files"):
        read_card(adapter)


def test_a_missing_file_is_named(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CardUnreadable, match=r"missing adapter_model\.safetensors"):
        read_card(adapter)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}'])
def test_a_card_that_does_not_parse_is_refused(adapter: Path, text: str) -> None:
    (adapter / "card.json").write_text(text)
    with pytest.raises(CardUnreadable):
        read_card(adapter)


def test_the_version_names_the_bytes_and_not_the_card(adapter: Path, tmp_path: Path) -> None:
    version = content_version(adapter)
    assert version == content_version(staged_adapter(tmp_path / "same"))
    assert version != content_version(staged_adapter(tmp_path / "other", weights=b"other"))


@pytest.mark.parametrize("name", ["a", "smollm2-135m", "0", "x" * 63, "a--b"])
def test_plain_labels_are_names(name: str) -> None:
    assert validate_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "A", "a/b", "..", "a.b", "a\n", "x" * 64, "ü", "a b", "a\0"]
)
def test_anything_else_is_not_a_name(name: str) -> None:
    with pytest.raises(InvalidName):
        validate_name(name)


def test_a_card_refuses_names_and_numbers_that_it_cannot_mean(adapter: Path) -> None:
    with pytest.raises(ValidationError):
        card_for(adapter, tenant="../acme")
    with pytest.raises(ValidationError):
        card_for(adapter, surprise=1)
    with pytest.raises(ValidationError):
        card_for(adapter, weights_sha256="abc")


def test_a_card_cannot_be_changed(adapter: Path) -> None:
    card: AdapterCard = read_card(adapter)
    with pytest.raises(ValidationError):
        card.tenant = "other"


def test_reading_cards_loads_neither_torch_nor_transformers_nor_peft() -> None:
    script = (
        "import sys, finetune.card; "
        "sys.exit(' '.join({'torch', 'transformers', 'peft', 'serve', 'quantize'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
