"""The adapter's card: what was trained, on which data and base, what was measured, and the gate's verdict.

This module is what `serve` reads; it must stay free of torch, transformers and peft.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from finetune.digest import file_sha256, json_sha256
from finetune.durable import write_durably
from finetune.errors import CardError, CardMismatch, CardUnreadable, InvalidName

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "CARD_NAME",
    "NAME_PATTERN",
    "WEIGHTS_NAME",
    "AdapterCard",
    "CardError",
    "CardMismatch",
    "CardUnreadable",
    "Data",
    "Gate",
    "InvalidName",
    "Libraries",
    "Metrics",
    "content_version",
    "read_card",
    "validate_name",
    "verify",
    "write_card",
]

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
ADAPTER_CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "card.json"

_FILES = {ADAPTER_CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
_CARD_BYTES_MAX = 1 << 20


def validate_name(name: str) -> str:
    """The name itself, if it is a plain label: names become directory names, URLs and metric labels.

    Raises:
        InvalidName: it is not 1 to 63 lower-case letters, digits and inner hyphens.
    """
    # fullmatch, because `$` alone also matches before a final newline.
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidName(name)
    return name


def _pydantic_name(name: str) -> str:
    try:
        return validate_name(name)
    except InvalidName as error:
        raise ValueError(str(error)) from error


Name = Annotated[str, AfterValidator(_pydantic_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(_Part):
    """What the adapter learned from. `dropped` counts rows by reason; their text is in no card.

    `trained_tokens` is what training read, each row as often as it was read; older cards do not say.
    """

    source_sha256: Sha256
    train_rows: int = Field(ge=1)
    heldout_rows: int = Field(ge=1)
    dropped: dict[str, int]
    trained_tokens: int | None = Field(None, ge=1, le=10**15)


class Libraries(_Part):
    torch: str
    transformers: str
    peft: str


class Metrics(_Part):
    """Measured on held-out rows. NLLs are means over answer tokens, in nats.

    `difference` is adapter minus base: negative is better. `difference_ci95` is its paired
    bootstrap interval, lower bound first.
    """

    heldout_rows: int = Field(ge=1)
    heldout_answer_tokens: int = Field(ge=1)
    base_nll: float
    adapter_nll: float
    difference: float
    difference_ci95: tuple[float, float]
    base_perplexity: float
    adapter_perplexity: float
    bootstrap_resamples: int = Field(ge=1)
    bootstrap_seed: int


class Gate(_Part):
    rule: str
    passed: bool
    reason: str


class AdapterCard(_Part):
    """One immutable version of one tenant's adapter, as `card.json` beside its weights."""

    schema_version: Literal[1] = 1
    tenant: Name
    adapter: Name
    version: Version
    base: Name
    base_sha256: Sha256
    rank: int = Field(ge=1)
    target_modules: tuple[str, ...]
    data: Data
    config: dict[str, Any]
    config_sha256: Sha256
    weights_sha256: Sha256
    adapter_config_sha256: Sha256
    seed: int
    libraries: Libraries
    metrics: Metrics
    gate: Gate
    created_at: AwareDatetime


def content_version(adapter_dir: Path) -> str:
    """The version that an adapter's bytes name: 16 hex digits.

    The first 16 of the SHA-256 over the canonical JSON list of (file name, SHA-256 of its bytes) of the two
    files that an engine loads. The card is left out: it may say more one day about the same adapter.

    Raises:
        CardUnreadable: one of the two files is missing.
    """
    return _version(_hashes(adapter_dir))


def read_card(directory: Path) -> AdapterCard:
    """The card of an adapter directory, which must hold an adapter's three files and nothing else.

    Anything else might be a pickle, code, or a file that some loader prefers to the one that was hashed.

    Raises:
        CardUnreadable: a file too many, a file missing, or a card that does not parse.
    """
    try:
        entries = list(directory.iterdir())
    except OSError as error:
        raise CardUnreadable(directory, f"cannot be listed: {error.strerror}") from error
    found = {entry.name for entry in entries}
    if unexpected := sorted(found - _FILES):
        raise CardUnreadable(directory, f"unexpected {', '.join(unexpected)}")
    if missing := sorted(_FILES - found):
        raise CardUnreadable(directory, f"missing {', '.join(missing)}")
    if odd := sorted(entry.name for entry in entries if entry.is_symlink() or not entry.is_file()):
        raise CardUnreadable(directory, f"not plain files: {', '.join(odd)}")
    path = directory / CARD_NAME
    if path.stat().st_size > _CARD_BYTES_MAX:
        raise CardUnreadable(directory, f"{CARD_NAME} is larger than {_CARD_BYTES_MAX} bytes")
    try:
        return AdapterCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or CARD_NAME
        raise CardUnreadable(directory, f"{CARD_NAME}: {where}: {first['msg']}") from error


def write_card(directory: Path, card: AdapterCard) -> None:
    """Write `card.json`, atomically and durably."""
    write_durably(directory / CARD_NAME, card.model_dump_json(indent=2) + "\n")


def verify(directory: Path) -> AdapterCard:
    """The card, once every hash in it has been computed again from the bytes beside it.

    Raises:
        CardUnreadable: see `read_card`.
        CardMismatch: a hash or the version does not agree.
    """
    card = read_card(directory)
    hashes = _hashes(directory)
    for field, expected, actual in (
        ("weights_sha256", card.weights_sha256, hashes[WEIGHTS_NAME]),
        ("adapter_config_sha256", card.adapter_config_sha256, hashes[ADAPTER_CONFIG_NAME]),
        ("config_sha256", card.config_sha256, json_sha256(card.config)),
        ("version", card.version, _version(hashes)),
    ):
        if expected != actual:
            raise CardMismatch(directory, field, expected, actual)
    return card


def _hashes(directory: Path) -> dict[str, str]:
    names = (ADAPTER_CONFIG_NAME, WEIGHTS_NAME)
    try:
        return {name: file_sha256(directory / name) for name in names}
    except OSError as error:
        raise CardUnreadable(directory, f"cannot read {error.filename}: {error.strerror}") from error


def _version(hashes: dict[str, str]) -> str:
    return json_sha256([[name, hashes[name]] for name in sorted(hashes)])[:16]
