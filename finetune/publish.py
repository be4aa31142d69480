"""Adapters in their store: `<root>/<tenant>/<adapter>/<version>/`, whole or absent, and never changed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

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
from finetune.durable import flush
from finetune.errors import GateFailed


def publish(staging_dir: Path, store_root: Path, card: AdapterCard) -> Path:
    """Put a trained adapter under the version that its bytes name; returns its directory.

    The files are copied into a hidden directory beside their place, flushed, verified against the card, and
    renamed: a reader sees the whole version or none. A version that is already there is left as it is, once
    verified, so publishing twice is harmless.

    Raises:
        GateFailed: the card's gate did not pass; nothing is written.
        InvalidName: the card names a tenant or adapter that is not a plain label.
        CardMismatch: the staged files are not those of the card, or those already published have changed.
    """
    if not card.gate.passed:
        raise GateFailed(card.gate.rule, card.gate.reason, card.metrics)
    # The model checks names too, but a card built by model_copy has not been through it.
    parent = store_root / validate_name(card.tenant) / validate_name(card.adapter)
    place = parent / validate_name(card.version)
    if place.exists():
        return _same(place, card)
    parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=parent, prefix=f".{card.version}."))
    try:
        for name in (ADAPTER_CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(staging_dir / name, beside / name)
            flush(beside / name)
        write_card(beside, card)
        verify(beside)
        beside.chmod(0o755)
        _rename(beside, place, card)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush(parent)
    return place


def find_published(
    store_root: Path, tenant: str, adapter: str, *, data_sha256: str, config_sha256: str, base_sha256: str
) -> AdapterCard | None:
    """The newest version trained on the same data with the same recipe from the same base, verified, if any.

    Raises:
        InvalidName: the tenant or adapter is not a plain label.
        CardMismatch: that version's files changed after publishing.
    """
    parent = store_root / validate_name(tenant) / validate_name(adapter)
    wanted = (tenant, adapter, data_sha256, config_sha256, base_sha256)
    newest: AdapterCard | None = None
    for directory in sorted(parent.glob("[!.]*")):
        try:
            card = read_card(directory)
        except CardUnreadable:
            continue
        found = (card.tenant, card.adapter, card.data.source_sha256, card.config_sha256, card.base_sha256)
        if found == wanted and (newest is None or card.created_at > newest.created_at):
            newest = card
    return None if newest is None else verify(parent / newest.version)


def _rename(beside: Path, place: Path, card: AdapterCard) -> None:
    """Rename a directory into place; if another process was first, its bytes must be the same."""
    try:
        os.rename(beside, place)
    except OSError:
        if not place.is_dir():
            raise
        _same(place, card)
        shutil.rmtree(beside)


def _same(place: Path, card: AdapterCard) -> Path:
    found = verify(place).version
    if found != card.version:
        raise CardMismatch(place, "version", card.version, found)
    return place
