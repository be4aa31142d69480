"""Publishes adapters into their store, `<root>/<tenant>/<adapter>/<version>/`, whole and unchanging."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from finetune.atomic_files import flush
from finetune.card import (
    ADAPTER_CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterCard,
    CardMismatch,
    CardUnreadable,
    read_card,
    validate_name,
    verify,
    write_card,
)
from finetune.errors import GateFailed


def publish(staging_dir: Path, store_root: Path, card: AdapterCard) -> Path:
    """Publishes a trained adapter under the version that its bytes determine; returns its directory.

    The files are copied into a hidden draft directory, flushed, verified against the card, and renamed into
    place: a reader sees the whole version or none. A version that is there already is verified and left as it
    is, so publishing twice is harmless.

    Raises:
        GateFailed: the card's gate did not pass; nothing is written.
        InvalidName: the card names a tenant or adapter that is not a plain label.
        CardMismatch: the staged files are not those of the card, or those already published have changed.
    """
    if not card.gate.passed:
        raise GateFailed(card.gate.rule, card.gate.reason, card.metrics.model_dump(mode="json"))
    # A card made by model_copy was not validated, so its names are checked here.
    adapter_dir = store_root / validate_name(card.tenant) / validate_name(card.adapter)
    version_dir = adapter_dir / validate_name(card.version)
    if version_dir.exists():
        return _verify_same(version_dir, card)
    adapter_dir.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=adapter_dir, prefix=f".{card.version}."))
    try:
        for name in (ADAPTER_CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(staging_dir / name, draft / name)
            flush(draft / name)
        write_card(draft, card)
        verify(draft)
        draft.chmod(0o755)
        _rename(draft, version_dir, card)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    flush(adapter_dir)
    return version_dir


def find_published(
    store_root: Path, tenant: str, adapter: str, *, data_sha256: str, config_sha256: str, base_sha256: str
) -> AdapterCard | None:
    """Finds the newest version trained on the same data with the same recipe from the same base; verifies it.

    Raises:
        InvalidName: the tenant or adapter is not a plain label.
        CardMismatch: that version's files changed after publishing.
    """
    adapter_dir = store_root / validate_name(tenant) / validate_name(adapter)
    expected = (tenant, adapter, data_sha256, config_sha256, base_sha256)
    newest: AdapterCard | None = None
    for directory in sorted(adapter_dir.glob("[!.]*")):
        try:
            card = read_card(directory)
        except CardUnreadable:
            continue
        actual = (card.tenant, card.adapter, card.data.source_sha256, card.config_sha256, card.base_sha256)
        if actual == expected and (newest is None or card.created_at > newest.created_at):
            newest = card
    return None if newest is None else verify(adapter_dir / newest.version)


def _rename(draft: Path, version_dir: Path, card: AdapterCard) -> None:
    """Renames a directory into place. If another process was first, its bytes must be the same."""
    try:
        os.rename(draft, version_dir)
    except OSError:
        if not version_dir.is_dir():
            raise
        _verify_same(version_dir, card)
        shutil.rmtree(draft)


def _verify_same(version_dir: Path, card: AdapterCard) -> Path:
    actual = verify(version_dir).version
    if actual != card.version:
        raise CardMismatch(version_dir, "version", card.version, actual)
    return version_dir
