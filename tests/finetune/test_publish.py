"""A version is published whole, once, and only with a passed gate."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.card import CardMismatch, InvalidName, read_card, verify
from finetune.errors import GateFailed
from finetune.publish import find_published, publish
from tests.support.finetune_samples import card_for, staged_adapter

KEYS = {"data_sha256": "d" * 64, "base_sha256": "b" * 64}


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    return staged_adapter(tmp_path / "staging")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


def test_a_published_version_lies_under_the_name_of_its_bytes(staging: Path, store: Path) -> None:
    card = card_for(staging)
    version_dir = publish(staging, store, card)
    assert version_dir == store / "acme" / "support" / card.version
    assert verify(version_dir) == card
    assert sorted(path.name for path in version_dir.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
    ]


def test_a_failed_gate_publishes_nothing_and_carries_the_metrics(staging: Path, store: Path) -> None:
    card = card_for(staging, passed=False)
    with pytest.raises(GateFailed) as caught:
        publish(staging, store, card)
    assert caught.value.metrics == card.metrics.model_dump(mode="json")
    assert not store.exists()


@pytest.mark.parametrize("name", ["..", "../../etc", "/tmp/x", "a/b", ".", ""])
@pytest.mark.parametrize("field", ["tenant", "adapter", "version"])
def test_names_that_are_paths_are_refused(staging: Path, store: Path, field: str, name: str) -> None:
    card = card_for(staging).model_copy(update={field: name})
    with pytest.raises(InvalidName):
        publish(staging, store, card)
    assert not store.exists()


def test_publishing_twice_keeps_the_first_card(staging: Path, store: Path) -> None:
    first = card_for(staging)
    version_dir = publish(staging, store, first)
    assert publish(staging, store, card_for(staging, seed=5)) == version_dir
    assert read_card(version_dir) == first


def test_a_published_version_that_changed_is_not_published_over(staging: Path, store: Path) -> None:
    card = card_for(staging)
    version_dir = publish(staging, store, card)
    (version_dir / "adapter_model.safetensors").write_bytes(b"changed")
    with pytest.raises(CardMismatch):
        publish(staging, store, card)


def test_files_that_the_card_does_not_describe_are_not_published(staging: Path, store: Path) -> None:
    card = card_for(staging)
    (staging / "adapter_model.safetensors").write_bytes(b"changed")
    with pytest.raises(CardMismatch):
        publish(staging, store, card)
    assert list((store / "acme" / "support").iterdir()) == []


def test_a_crash_before_the_rename_leaves_no_version(
    staging: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        publish(staging, store, card_for(staging))
    assert list((store / "acme" / "support").iterdir()) == []


def test_losing_the_race_to_publish_the_same_bytes_is_no_error(
    staging: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    winner = card_for(staging, seed=1)

    def beaten(source: Path, version_dir: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        publish(staging, store, winner)
        rename(source, version_dir)

    monkeypatch.setattr(os, "rename", beaten)
    version_dir = publish(staging, store, card_for(staging))
    assert read_card(version_dir) == winner
    assert list(version_dir.parent.iterdir()) == [version_dir]


def test_an_identical_job_is_found_and_another_is_not(staging: Path, store: Path) -> None:
    card = card_for(staging)
    keys = {**KEYS, "config_sha256": card.config_sha256}
    assert find_published(store, "acme", "support", **keys) is None
    publish(staging, store, card)
    assert find_published(store, "acme", "support", **keys) == card
    assert find_published(store, "other", "support", **keys) is None
    for key in keys:
        assert find_published(store, "acme", "support", **{**keys, key: "0" * 64}) is None


def test_what_is_found_is_verified(staging: Path, store: Path) -> None:
    card = card_for(staging)
    version_dir = publish(staging, store, card)
    (version_dir / "adapter_model.safetensors").write_bytes(b"changed")
    with pytest.raises(CardMismatch):
        find_published(store, "acme", "support", **KEYS, config_sha256=card.config_sha256)
